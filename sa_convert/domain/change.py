"""What a plan removes from a model."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Change:
    """A quantity of the base model and of the converted one."""

    before: int
    after: int

    @property
    def removed(self) -> float:
        """The part that is gone, 0 to 1."""
        return 1 - self.after / self.before if self.before else 0.0


@dataclass(frozen=True)
class CacheBytes(Change):
    """Bytes of the whole cache of one sequence of `at` tokens, in the dtype of the weights.

    measured_at: so many tokens filled a real cache; if they are fewer than `at`, the rest is computed from the plan.
    None: all is computed. room: what more the converted model's cache takes, such as for tokens that come back if the
    last ones are taken back; None if that was not measured.
    """

    at: int
    measured_at: int | None = None
    room: int | None = None

    def to_json(self) -> dict[str, Any]:
        sizes = {"at": self.at, "before": self.before, "after": self.after, "removed": round(self.removed, 6)}
        return sizes | {"measured_at": self.measured_at, "room": self.room}


@dataclass(frozen=True)
class Savings:
    """What a plan removes.

    cache_bytes_per_token: one sequence, in the dtype of the weights. cache_over: if tokens do not all add as much, so
    many tokens it is the average over; None: each adds that. key_cache_removed: the part of all keys in the cache that
    is gone, 0 to 1. caches: the whole cache at several lengths; empty for a model without one.
    """

    parameters: Change
    checkpoint_bytes: Change
    cache_bytes_per_token: Change
    key_cache_removed: float
    cache_over: int | None = None
    caches: tuple[CacheBytes, ...] = ()

    def to_json(self) -> dict[str, Any]:
        over = {} if self.cache_over is None else {"average_over": self.cache_over}
        return {
            "parameters": asdict(self.parameters),
            "checkpoint_bytes": asdict(self.checkpoint_bytes),
            "cache_bytes_per_token": asdict(self.cache_bytes_per_token) | over,
            "key_cache_removed": round(self.key_cache_removed, 6),
        }
