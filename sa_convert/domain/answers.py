"""What one KV group of a layer computes and caches, in the base or after treatments have changed it.

Treatments combine, since each changes some of the answers: low-rank values go with borrowed scores, a window with both.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Answers:
    """The answers to what a plan asks of a KV group. As elements of one sequence in one layer."""

    heads: tuple[int, ...]
    """Query heads that put something out, by their numbers in the layer."""
    scores: tuple[int, ...]
    """Those of them that compute scores of their own, from a query and the group's key."""
    keys: int
    """Elements of a cached key."""
    values: int
    """Elements of a cached value."""
    reach: int | None = None
    """The most tokens that a query sees, and that are cached; None: all. In the base: the layer's own window."""
    fixed: int = 0
    """Elements that are cached however short the text is."""

    def cached(self, tokens: int) -> int:
        """Elements that are cached after so many tokens."""
        return self.fixed + (self.keys + self.values) * self.seen(tokens)

    def seen(self, tokens: int) -> int:
        """Of so many tokens, those that are seen and cached."""
        return tokens if self.reach is None else min(tokens, self.reach)
