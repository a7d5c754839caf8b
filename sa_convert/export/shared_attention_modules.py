"""Attention of families whose own code does not go through the attention interface, or takes special steps."""

from .shared_attention import SharedAttention

MODULES: dict[str, type[SharedAttention]] = {}
"""By the name that a family's entry gives under `module`."""
