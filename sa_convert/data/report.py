"""What a conversion did, saved and cost: the contents of report.json."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """A quantity of the base model and of the converted one."""

    before: int
    after: int


@dataclass(frozen=True)
class Savings:
    """What sharing removes. cache_bytes_per_token: one sequence, in the dtype of the weights.

    key_cache_removed: the part of all keys in the cache that is gone, 0 to 1.
    """

    parameters: Change
    checkpoint_bytes: Change
    cache_bytes_per_token: Change
    key_cache_removed: float
