"""What `sa-convert chat` does: a conversation in the terminal, or one prompt from a pipe, with a cache that is kept."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from sa_convert.console.progress import note, tell
from sa_convert.domain.model import RunOptions
from sa_convert.errors import DataError, SessionError
from sa_convert.models.placement import most_positions, placed
from sa_convert.models.quiet import keep_module_cache_clean
from sa_convert.models.subject import Subject, open_subject
from sa_convert.models.task import task_of
from sa_convert.output.signals import termination_as_exit
from sa_convert.plan.audited import foreign_code
from sa_convert.sessions.conversation import Answer, Conversation
from sa_convert.sessions.session_file import check_replaceable
from sa_convert.sessions.turn_tokens import has_template

EXIT = "/exit"

CONTEXT = 8192
"""Tokens of the context of a model that names no limit."""


@dataclass(frozen=True, kw_only=True)
class ChatOptions(RunOptions):
    """session: the file in which the conversation is kept, or None. system: what the model is told first. most: tokens
    of an answer. context: tokens of the conversation, or None: as many as the model has positions. temperature: 0 is
    greedy; None: as the model's generation_config.json says. seed: of what is drawn."""

    session: Path | None = None
    system: str | None = None
    most: int = 512
    context: int | None = None
    temperature: float | None = None
    seed: int | None = None


def chat(model: str, options: ChatOptions, ask: Callable[[], str | None], say: Callable[[str], None]) -> None:
    """Talk until `ask` gives None or /exit. say: is given the answers, piece by piece, with a newline at the end of
    each. The session is written while the next prompt is typed.

    Raises CheckpointError, DataError (no tokenizer, a model that does not continue text), SessionError (a session of
    another model, a damaged one) and OutputError.
    """
    keep_module_cache_clean()
    with termination_as_exit(), TemporaryDirectory(prefix="sa-convert-chat-") as temporary:
        # 1. The session's file: nothing else must be lost, and it takes a while to load the model.
        if options.session is not None:
            check_replaceable(options.session)

        # 2. The model and its tokenizer.
        subject = open_subject(model, Path(temporary) / "model", options, foreign_code)
        tokenizer = subject.tokenizer()
        if task_of(subject.config, tokenizer, subject.name).name != "next-token":
            raise DataError(f"{subject.name}: does not continue a text, so there is nobody to talk to.")
        with subject.load(placed(subject.folder, options)) as loaded:
            # 3. A new conversation, or the one in the file.
            conversation = _conversation(subject, loaded.model, tokenizer, options)

            # 4. Turn by turn.
            if options.seed is not None:
                import torch

                torch.manual_seed(options.seed)
            try:
                while (text := ask()) is not None and text.strip() != EXIT:
                    if text.strip():
                        _turn(conversation, text, options, say)
            finally:
                conversation.wait()


def _conversation(subject: Subject, model: Any, tokenizer: Any, options: ChatOptions) -> Conversation:
    limit = most_positions(subject.config)
    if options.context is not None and limit is not None and options.context > limit:
        raise DataError(f"--context {options.context} is more than the {limit} positions of the model: give fewer.")
    conversation = Conversation(model=model, tokenizer=tokenizer, limit=options.context or limit or CONTEXT, tell=note)
    if not has_template(tokenizer):
        note(f"{subject.name} has no chat template, so it goes on with your text as it stands.")
    file = options.session
    if file is not None and file.exists() and file.stat().st_size:
        conversation.resume(file)
        begun = [message["content"] for message in conversation.messages[:1] if message["role"] == "system"]
        if options.system is not None and begun != [options.system]:
            raise SessionError(f"{file}: began with another --system: leave that out, or begin another session.")
        turns = len(conversation.starts)
        tell(f"Goes on after {turns} turn{'s' * (turns != 1)}: {conversation.cached} tokens are in the cache.")
    elif options.system is not None:
        conversation.messages.append({"role": "system", "content": options.system})
    return conversation


def _turn(conversation: Conversation, text: str, options: ChatOptions, say: Callable[[str], None]) -> Answer:
    sampling: dict[str, Any] = {}
    if options.temperature == 0:
        sampling = {"do_sample": False}
    elif options.temperature is not None:
        sampling = {"do_sample": True, "temperature": options.temperature}
    with _interruptible() as interrupted:
        answer = conversation.answer(
            text, options.most, streamer=_spoken(conversation.tokenizer, say), stop=interrupted, options=sampling
        )
    if answer.dropped:
        note("the context was full, so the oldest turns went.")
    if options.session is not None:
        conversation.save_later(options.session)
    return answer


def _spoken(tokenizer: Any, say: Callable[[str], None]) -> Any:
    """A streamer that says text as soon as it is certain."""
    from transformers import TextStreamer

    class Spoken(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            say(text + "\n" * stream_end)

    return Spoken(tokenizer, skip_prompt=True, skip_special_tokens=True)


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C ends the answer at its next token, where the cache is whole. A second one ends the program."""
    pressed: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
