"""The tokens of a conversation's turns, by the model's chat template.

What a model has read and said stays as it is. A new turn adds what the template puts after the last answer:

    <user> Hi <end> <assistant> | Hello. <end> |  \\n  | <user> And you? <end> <assistant>
    what was read               | what was said | lead | the new turn

Before the first turn the lead is what the template puts before every conversation, such as a system's message.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sa_convert.errors import DataError
from sa_convert.models.tokens import start_tokens

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class NewTurn:
    """Tokens to read next. whole: the template writes what was said in another way than it was read, so these are the
    tokens of the whole conversation."""

    lead: tuple[int, ...]
    turn: tuple[int, ...]
    whole: bool = False

    @property
    def turn_and_lead(self) -> tuple[int, ...]:
        return (*self.lead, *self.turn)


def new_turn(tokenizer: Any, messages: Messages, last: int | None) -> NewTurn:
    """messages: the last one is the user's; of the others the model has read and said everything. last: the last token
    that it said, or None before its first answer. Raises DataError for messages that the template refuses."""
    after = rendered(tokenizer, messages, True)
    if last is None:
        opening = _opening(tokenizer, messages, after)
        start = [] if has_template(tokenizer) else start_tokens(tokenizer)
        return NewTurn((*start, *_ids(tokenizer, opening)), tuple(_ids(tokenizer, after[len(opening) :])))
    *earlier, answer = messages[:-1]
    read = rendered(tokenizer, earlier, True)
    content = next(
        (said for said in (answer["content"], answer["content"].strip()) if after.startswith(read + said)), None
    )
    if content is None:
        return NewTurn((), tuple(_ids(tokenizer, after)), whole=True)
    before, rest = rendered(tokenizer, messages[:-1], False), after[len(read + content) :]
    known = after.startswith(before) and before.startswith(read + content)
    lead = before[len(read + content) :] if known else ""
    ids = _ids(tokenizer, lead), _ids(tokenizer, rest[len(lead) :])
    first = next((part for part in ids if part), [])
    if first[:1] == [last] and last in tokenizer.all_special_ids:  # the answer ended itself
        del first[0]
    return NewTurn(tuple(ids[0]), tuple(ids[1]))


def has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def rendered(tokenizer: Any, messages: Messages, answer: bool) -> str:
    """Text of the messages. answer: with what comes before an answer. Without a template, their contents as they are.
    Raises DataError for messages that the template refuses."""
    if not has_template(tokenizer):
        return "".join(message["content"] for message in messages)
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)
        return text
    except (TemplateError, ValueError, TypeError) as error:
        raise DataError(f"The model's chat template refuses these messages: {error}") from error


def _opening(tokenizer: Any, messages: Messages, after: str) -> str:
    """The text before the first turn: what is left of it without the turn, as it would be written as a second one."""
    if not has_template(tokenizer):
        return ""
    answered = [*messages, {"role": "assistant", "content": "-"}]
    try:
        one = rendered(tokenizer, answered, False)
        two = rendered(tokenizer, [*answered, messages[-1]], True)
    except DataError:
        return ""
    turn = two[len(one) :] if two.startswith(one) else ""
    return after[: len(after) - len(turn)] if turn and after.endswith(turn) else ""


def common_tokens(mine: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = enumerate(zip(mine, others, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(mine), len(others)))


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    return ids
