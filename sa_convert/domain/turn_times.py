"""What `bench --turns` measures: how long a model takes to its first word, with the cache that was kept and without."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sa_convert.domain.benchmark import Spread
from sa_convert.domain.rounding import digits


@dataclass(frozen=True, kw_only=True)
class TurnTime:
    """One turn of a conversation. Times in seconds."""

    history: int
    """Tokens that were said before it."""

    new: int
    """Tokens of the user's message."""

    recomputed: Spread
    """To the first token of the answer, if the history is computed again."""

    kept: Spread | None
    """The same from the file: its cache is loaded, and the new tokens are read. None for the first turn."""

    loading: Spread | None
    """The part of that until the cache is there, most of which is still in the file then."""

    writing: float
    """Until the session after this turn is on the disk."""

    file_bytes: int
    """Of that session."""

    cache_bytes: int
    """That the next token needs of the cache in it."""

    same_tokens: bool
    """The answer from the kept cache is, token by token, that of a conversation whose cache never left memory."""

    @property
    def saved(self) -> float | None:
        """The part of the time that is saved, a median of pairs of runs."""
        return None if self.kept is None else 1 - self.kept.ratio_to(self.recomputed).median

    def to_json(self) -> dict[str, Any]:
        return {
            "history": self.history,
            "new": self.new,
            "recomputed_seconds": self.recomputed.to_json(),
            "kept_seconds": self.kept and self.kept.to_json(),
            "loading_seconds": self.loading and self.loading.to_json(),
            "saved": digits(self.saved),
            "writing_seconds": digits(self.writing),
            "file_bytes": self.file_bytes,
            "cache_bytes": self.cache_bytes,
            "same_tokens": self.same_tokens,
        }


@dataclass(frozen=True)
class TimedConversation:
    """One model's. id: what results call it."""

    id: str
    turns: tuple[TurnTime, ...]


@dataclass(frozen=True, kw_only=True)
class TurnConditions:
    """What the models ran under."""

    device: str
    dtype: str
    threads: int
    processor: str
    context: int
    """Tokens of the whole conversation."""

    new_tokens: int
    """Of each answer."""

    repeats: int
    seed: int


@dataclass(frozen=True)
class TurnsBenchmark:
    """Everything."""

    models: Sequence[TimedConversation]
    conditions: TurnConditions
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """For --json and bench.json."""
        return {
            "models": [{"id": each.id, "turns": [turn.to_json() for turn in each.turns]} for each in self.models],
            "conditions": asdict(self.conditions),
            "versions": dict(self.versions),
        }
