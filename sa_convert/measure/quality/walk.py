"""How a sequence goes through a model that has a cache: in which pieces, so that it crosses what the cache forgets."""

STEPS = 32
"""Tokens that go one by one at the end."""

CROSSING = 8
"""Tokens that go one by one before the end of a window, and as many behind it."""

PIECE = 24
"""Tokens of one more piece of the prompt, when the window has begun to move."""


def walk(length: int, window: int | None = None) -> tuple[int, ...]:
    """Sizes of the pieces in which `length` tokens are given to a model.

    window: the most tokens that the cache of some KV group holds. Without one, half of the sequence in one piece, then
    token by token. With one, nearly as much as it holds, in two pieces; then token by token over its end; then another
    piece, as of a prompt that comes in chunks; then token by token again.
    """
    if window is None or window >= length:
        half = length // 2
        return (half, *[1] * (length - half))
    begin = max(1, window - CROSSING)
    first = -(-begin // 2)
    wanted = [first, begin - first, *[1] * (window - begin + CROSSING), PIECE]
    pieces, used = [], 0
    for size in wanted:
        size = min(size, length - used)
        if size > 0:
            pieces.append(size)
            used += size
    return (*pieces, *[1] * (length - used))


def in_one_piece(length: int, window: int) -> tuple[int, ...]:
    """The same for models that take only single tokens once their cache has been filled."""
    begin = max(1, min(window - CROSSING, length - 1))
    return (begin, *[1] * (length - begin))


def walked_length(window: int, limit: int | None) -> int:
    """Tokens of a sequence that crosses a window. limit: positions of the model, or None."""
    length = window + CROSSING + PIECE + STEPS
    return length if limit is None else min(length, limit)
