"""What a plan removes from a model."""

from dataclasses import dataclass


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
class Savings:
    """What a plan removes. cache_bytes_per_token: one sequence, in the dtype of the weights.

    key_cache_removed: the part of all keys in the cache that is gone, 0 to 1.
    """

    parameters: Change
    checkpoint_bytes: Change
    cache_bytes_per_token: Change
    key_cache_removed: float
