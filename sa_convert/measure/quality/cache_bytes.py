"""Bytes that a model caches, measured on a cache that it has filled."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sa_convert.models.arguments import caches_in, last_logits_only
from sa_convert.models.steps import Steps
from sa_convert.models.task import Decoding


def cache_bytes_per_token(
    model: Any, tokens: torch.Tensor, dtype: torch.dtype | None = None, source: torch.Tensor | None = None
) -> int:
    """Bytes of all cached tensors for one token of one sequence, from a forward pass over `tokens` (T).

    A layer that keeps fewer tokens than it was given (a sliding window) counts by the tokens that it keeps; one that
    keeps a state of fixed size does not count. dtype: count as if the cache had this dtype, for a model that is
    computed in another one than its weights have. source: (S,), what an encoder reads: then the bytes are those for one
    token of the decoder, and in cross-attention for one of the encoder.
    """
    total = 0
    for layer in (layer for part in caches_in(filled(model, tokens, source)) for layer in part.layers):
        if getattr(layer, "keys", None) is None:
            continue  # a state of fixed size
        for states in (layer.keys, layer.values):  # (1, heads, tokens, head size), the last may be 0
            size = dtype.itemsize if dtype is not None else states.element_size()
            total += states.numel() // states.shape[-2] * size
    return total


def cache_bytes(
    model: Any, tokens: torch.Tensor, dtype: torch.dtype | None = None, source: torch.Tensor | None = None
) -> "Held":
    """The whole cache of one sequence of `tokens` (T), states of fixed size included; the rest as for
    `cache_bytes_per_token`."""
    return held(filled(model, tokens, source), dtype)


@dataclass(frozen=True)
class Held:
    """Bytes of a cache. needed: of the keys, values and states that the next token needs. room: what more is there,
    such as tokens that come back if the last ones are taken back."""

    needed: int
    room: int = 0


NOTHING = Held(0)


def held(cache: Any, dtype: torch.dtype | None = None) -> Held:
    """From all tensors that a cache holds, see `bytes_of`. A layer that has room tells what it needs, as `nbytes`."""
    everything = bytes_of(cache, dtype)
    layers = (layer for part in caches_in(cache) for layer in getattr(part, "layers", ()))
    room = sum(bytes_of(layer, dtype) - _needed(layer, dtype) for layer in layers if hasattr(layer, "nbytes"))
    return Held(everything - room, room)


def _needed(layer: Any, dtype: torch.dtype | None) -> int:
    """What a layer says that it needs, which it counts in the dtype that it has."""
    size = next((states.element_size() for states in tensors_in(layer) if states.is_floating_point()), 1)
    return int(layer.nbytes) * (dtype.itemsize if dtype is not None else size) // size


def bytes_of(cache: Any, dtype: torch.dtype | None = None) -> int:
    """Bytes of all tensors that a cache holds, in its layers and whatever these consist of. A tensor that several parts
    hold counts once. Of a tensor that is a view, what it shows counts and not the room behind it; and if something
    shows a part of a room, the room itself does not count. dtype: count floating-point numbers as if they had it.
    """
    total = 0
    for states in _shown(tensors_in(cache)):
        floats = dtype is not None and states.is_floating_point()
        total += states.numel() * (dtype.itemsize if floats and dtype is not None else states.element_size())
    return total


def filled(model: Any, tokens: torch.Tensor, source: torch.Tensor | None = None) -> Any:
    """A cache after a pass over `tokens` (T)."""
    steps = Steps(model, Decoding(tokens, source))
    with torch.inference_mode():
        steps.first(steps.tokens, **last_logits_only(model))
    return steps.cache


def tensors_in(holder: Any, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """Tensors of at least two dimensions, so no counters, in attributes, lists and mappings, each once."""
    seen = set() if seen is None else seen
    if id(holder) in seen:
        return
    seen.add(id(holder))
    if isinstance(holder, torch.Tensor):
        if holder.ndim >= 2 and holder.numel():
            yield holder
        return
    if isinstance(holder, dict):
        parts = list(holder.values())
    elif isinstance(holder, list | tuple | set):
        parts = list(holder)
    elif isinstance(holder, type | torch.nn.Module) or not _holds_states(holder):
        return
    else:
        parts = [part for name, part in vars(holder).items() if name != "config"]
    for part in parts:
        yield from tensors_in(part, seen)


def _holds_states(holder: Any) -> bool:
    """A cache, a layer of one, or a part of a layer: an object with attributes that is no function and no config."""
    return hasattr(holder, "__dict__") and not callable(holder) and not hasattr(holder, "model_type")


def _shown(tensors: Iterator[torch.Tensor]) -> list[torch.Tensor]:
    """Without those that show the whole of a room of which others show a part, and without the second of equal ones."""
    rooms: dict[int, dict[tuple[Any, ...], torch.Tensor]] = {}
    for states in tensors:
        where = (states.data_ptr(), tuple(states.shape), states.stride())
        rooms.setdefault(states.untyped_storage().data_ptr(), {})[where] = states
    found = []
    for views in rooms.values():
        parts = [states for states in views.values() if states.nbytes < states.untyped_storage().nbytes()]
        found += parts or list(views.values())
    return found
