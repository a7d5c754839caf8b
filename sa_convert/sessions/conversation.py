"""A conversation with a model: what was read is never computed again, in this process or in the next."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sa_convert.errors import SessionError
from sa_convert.models.arguments import dynamic_cache
from sa_convert.sessions.answering import generate
from sa_convert.sessions.identity import identity_of
from sa_convert.sessions.loading import OtherRelease, load, told_in
from sa_convert.sessions.overflow import SINKS, first_kept, make_room
from sa_convert.sessions.rotation import Rotation
from sa_convert.sessions.saving import Saving, save_later
from sa_convert.sessions.turn_tokens import common_tokens, new_turn

SPARE = 4
"""If the context is full, at least its fourth part becomes free, so that the next turns find room."""

_MESSAGE = dict[str, str]


@dataclass(frozen=True)
class Answer:
    """What a model said. read: tokens that it had to read before. dropped: tokens that went to make room."""

    text: str
    tokens: tuple[int, ...]
    read: int
    dropped: int


@dataclass(kw_only=True)
class Conversation:
    """One row of text. The model reads what is new of each turn, and answers."""

    model: Any
    tokenizer: Any

    limit: int
    """Tokens of the longest context."""

    tell: Callable[[str], None] = lambda sentence: None
    """Is told what the user should know: that something is computed again."""

    messages: list[_MESSAGE] = field(default_factory=list)
    """What was said: a system's message perhaps, then the user's and the model's in turn."""

    tokens: list[int] = field(default_factory=list)
    """All that was read and said. The model may not have read the last ones yet."""

    starts: list[int] = field(default_factory=list)
    """Where in `tokens` each turn of the user begins."""

    def __post_init__(self) -> None:
        self.cache = dynamic_cache(self.model)
        self.identity = identity_of(self.model)
        self._saving: Saving | None = None
        self._rotation: Rotation | None = None

    @property
    def cached(self) -> int:
        """Tokens that the model has read."""
        return int(self.cache.get_seq_length())

    def answer(
        self,
        text: str,
        most: int,
        *,
        streamer: Any = None,
        stop: Callable[[], bool] = lambda: False,
        options: Mapping[str, Any] | None = None,
    ) -> Answer:
        """Read what the user says, and answer in `most` tokens or fewer. stop: asked after each token. options: of
        generate(). Raises SessionError if the text is longer than the context."""
        self.wait()
        before = len(self.tokens)
        reserve = min(most, max(self.limit // SPARE, 1))
        said = {"role": "user", "content": text}
        turn = new_turn(self.tokenizer, [*self.messages, said], self.tokens[-1] if self.starts else None)
        if turn.whole:
            dropped = self._begin_again(said, reserve)
        else:
            self.starts.append(len(self.tokens) + len(turn.lead))
            self.tokens += [*turn.lead, *turn.turn]
            self.messages.append(said)
            dropped = self._make_room(before, reserve)
        read = len(self.tokens) - self.cached
        most = min(most, self.limit - len(self.tokens))
        tokens = generate(self.model, self.tokenizer, self.tokens, self.cache, most, streamer, stop, options or {})
        self.tokens += tokens
        content = self.tokenizer.decode(tokens, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": content})
        return Answer(content, tuple(tokens), read, dropped)

    def save_later(self, file: Path) -> None:
        """Begin to write the session. The next turn waits until it is there."""
        self.wait()
        notes = {"messages": self.messages, "starts": self.starts}
        tokens = torch.tensor([self.tokens], dtype=torch.int32)
        self._saving = save_later(self.cache, tokens, file, self.model, notes=notes, identity=self.identity)

    def wait(self) -> None:
        """Until the session is written. Raises OutputError if it cannot be."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.wait()

    def resume(self, file: Path) -> None:
        """Go on with the session in a file. If its cache is one of another release of transformers, what was said is
        read again. Raises SessionError for a file of another model, or a damaged one."""
        try:
            session = load(file, self.model, identity=self.identity)
            self.cache, tokens, notes = session.cache, session.tokens, session.notes
        except OtherRelease as error:
            self.tell(f"{error} What was said is read again now.")
            tokens, notes = told_in(file)
        messages, starts = notes.get("messages"), notes.get("starts")
        if len(tokens) != 1 or not isinstance(messages, list) or not isinstance(starts, list):
            raise SessionError(f"{file}: holds a cache and no conversation: load it from Python.")
        self.tokens, self.messages, self.starts = tokens[0].tolist(), list(messages), list(starts)

    @property
    def _system(self) -> int:
        """Messages before the first turn: 1 or 0."""
        return int(bool(self.messages) and self.messages[0]["role"] == "system")

    def _forget_turns(self, count: int) -> None:
        """Oldest messages, of the user and of the model."""
        del self.messages[self._system : self._system + 2 * count]

    def _begin_again(self, said: _MESSAGE, reserve: int) -> int:
        """The template writes what was said in another way now. Of the cache stays what the new text begins with, and
        of the text as much as there is room for. Returns the number of messages that went, as there are no tokens."""
        gone = 0
        while True:
            tokens = list(new_turn(self.tokenizer, [*self.messages, said], None).turn_and_lead)
            if len(tokens) + reserve <= self.limit:
                break
            if len(self.messages) <= self._system:
                raise self._too_long(reserve)
            self._forget_turns(1)
            gone += 1
        cached = self.cached
        same = common_tokens(self.tokens[:cached], tokens[:-1])
        try:
            if not same:
                raise ValueError
            if same < cached:
                self.cache.crop(same - cached)
        except (ValueError, RuntimeError):  # a window, or a state of the whole text, has lost what was before
            self.cache = dynamic_cache(self.model)
        self.messages.append(said)
        self.tokens, self.starts = tokens, [0] * sum(message["role"] == "user" for message in self.messages)
        return gone

    def _make_room(self, before: int, reserve: int) -> int:
        """Let the oldest turns go if the context is full. before: tokens without the new turn. Returns the number of
        tokens that went."""
        least = len(self.tokens) + reserve - self.limit
        if least <= 0:
            return 0
        first = first_kept(self.cache, max(SINKS, self.starts[0]))
        ends = [start for start in self.starts[1:] if start - first >= least]
        if not ends:
            del self.tokens[before:], self.starts[-1], self.messages[-1]
            raise self._too_long(reserve)
        wanted = first + max(least, self.limit // SPARE)
        end = next((start for start in ends if start >= wanted), ends[-1])
        cached = self.cached
        if cached > first:
            try:
                self._rotation = self._rotation or Rotation(self.model)
                make_room(self.cache, self.model, min(end, cached) - first, first, self._rotation)
            except SessionError as error:
                self.tell(f"{error} It is read again now.")
                self.cache = dynamic_cache(self.model)
        self._forget_turns(sum(start < end for start in self.starts))
        del self.tokens[first:end]
        self.starts = [start - end + first for start in self.starts if start >= end]
        return end - first

    def _too_long(self, reserve: int) -> SessionError:
        return SessionError(
            f"The message has no room in a context of {self.limit} tokens, of which {reserve} are for the answer: "
            "write a shorter one, or give a larger --context."
        )
