"""What the metadata of a .gguf file tell of attention: size of heads, windows, scale of scores, positions."""

import math
from typing import Any

from sa_convert.errors import UnsupportedModelError
from sa_convert.read.gguf_metadata import CONTEXT, DEPTH, GROUPS, HEADS, HIDDEN, Metadata
from sa_convert.read.gguf_rope import is_scaling, scaled_positions

_KEY_SIZE, _VALUE_SIZE = "attention.key_length", "attention.value_length"
_WINDOW, _PATTERN, _SCALE = "attention.sliding_window", "attention.sliding_window_pattern", "attention.scale"
_BASE, _LOCAL_BASE, _ROTATED = "rope.freq_base", "rope.freq_base_swa", "rope.dimension_count"
_DEFAULT_BASE = 10000.0  # of llama.cpp


def attention_config(metadata: Metadata) -> dict[str, Any]:
    """The config keys on attention. Raises CheckpointError, UnsupportedModelError."""
    entry = metadata.entry
    size = head_size(metadata)
    usual = size == metadata.count(HIDDEN, 1) // metadata.count(HEADS, 1)
    told = entry.head_size == "told" or (entry.head_size == "extra" and not usual)
    config: dict[str, Any] = {"head_dim": size} if told else {}
    config |= _windows(metadata) | _score_scale(metadata, size)
    if entry.rotary != "none":
        config["rope_parameters"] = _positions(metadata, size)
    return config


def head_size(metadata: Metadata) -> int:
    """Numbers of a query or key. Raises CheckpointError if tensors contradict it, UnsupportedModelError if the model
    type cannot have it."""
    entry, tensors, file = metadata.entry, metadata.header.tensors, metadata.header.file
    heads, hidden = metadata.count(HEADS, 1), metadata.count(HIDDEN, 1)
    default = hidden // heads
    if entry.rotary == "all" and _KEY_SIZE not in metadata.own:
        default = metadata.count(_ROTATED, default)  # of a head that is rotated as a whole
    size = metadata.count(_KEY_SIZE, default)
    values = metadata.count(_VALUE_SIZE, size)
    if values != size:
        raise metadata.beyond(_VALUE_SIZE, f"is {values}, and {metadata.name(_KEY_SIZE)} {size}")
    if entry.head_size == "none" and size * heads != hidden:
        raise UnsupportedModelError(
            f"{file}: its heads have a size of their own ({metadata.name(_KEY_SIZE)} is {size}), but transformers "
            f"gives heads of a model of type '{entry.model_type}' hidden size by heads, here {hidden} / {heads}; "
            "choose another model."
        )
    query = next((tensor for name, tensor in tensors.items() if name.endswith(".attn_q.weight")), None)
    if query is not None and query.shape[0] != size * heads * (2 if entry.gated else 1):
        raise metadata.wrong(
            _KEY_SIZE if _KEY_SIZE in metadata.own else HEADS,
            f"makes heads of {size} numbers, {heads} of them, but '{query.name}' has {query.shape[0]} rows",
        )
    return size


def _windows(metadata: Metadata) -> dict[str, Any]:
    """Which layers see only the last tokens, and how many. A window that is no shorter than the context is none."""
    entry, depth = metadata.entry, metadata.count(DEPTH, 1)
    window, pattern = metadata.own.get(_WINDOW, entry.usual_window), metadata.own.get(_PATTERN)
    if not isinstance(window, int) or (window and not entry.window and window < metadata.own.get(CONTEXT, math.inf)):
        return {}  # neither key is taken, and so they are refused
    metadata.taken.update((_WINDOW, _PATTERN))
    if not entry.window:
        return {}
    if not entry.layer_types:
        if window and pattern not in (None, 0):
            raise metadata.beyond(_PATTERN, f"is {str(pattern)[:60]}")
        return {"sliding_window": window or None}
    if not window:
        return {"layer_types": ["full_attention"] * depth}
    if pattern is None:
        return {"sliding_window": window}
    if isinstance(pattern, int) and not isinstance(pattern, bool):
        pattern = [not pattern or layer % pattern < pattern - 1 for layer in range(depth)]
    if not isinstance(pattern, list) or len(pattern) != depth:
        raise metadata.wrong(_PATTERN, f"does not tell of all {depth} layers")
    types = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    return {"sliding_window": window, "layer_types": types}


def _score_scale(metadata: Metadata, size: int) -> dict[str, Any]:
    """What scores are multiplied by; 0 and no key mean the usual 1 / sqrt(size of a head)."""
    scale, name = metadata.own.get(_SCALE, 0.0), metadata.entry.scale
    if not isinstance(scale, float) or not 0 <= scale < math.inf:
        return {}
    if name is None:
        if scale == 0 or math.isclose(scale, size**-0.5, rel_tol=1e-6):
            metadata.taken.add(_SCALE)
        return {}
    metadata.taken.add(_SCALE)
    if scale:
        square = scale**-2
    elif metadata.count(DEPTH, 1) == metadata.entry.scale_by_width:
        square = metadata.count(HIDDEN, 1) / metadata.count(HEADS, 1)
    else:
        square = size
    return {name: round(square) if math.isclose(square, round(square), rel_tol=1e-5) else square}


def _positions(metadata: Metadata, size: int) -> dict[str, Any]:
    """`rope_parameters`: the base, how positions are scaled, and the part of a head that is rotated."""
    entry, header = metadata.entry, metadata.header
    rotated, theta = metadata.count(_ROTATED, size), _base(metadata, _BASE)
    if rotated > size or rotated % 2 or (entry.rotary == "all" and rotated != size):
        raise metadata.beyond(_ROTATED, f"rotates {rotated} of the {size} numbers of a head")
    metadata.taken.update(key for key in metadata.own if is_scaling(key))
    found = {"rope_theta": theta, **scaled_positions(header, theta, rotated, entry.scalings)}
    if entry.rotary == "part":
        found["partial_rotary_factor"] = rotated / size
    if entry.local_base:
        local = {"rope_type": "default", "rope_theta": _base(metadata, _LOCAL_BASE)}
        return {"full_attention": found, "sliding_attention": local}
    return found


def _base(metadata: Metadata, key: str) -> float:
    theta = metadata.take(key, _DEFAULT_BASE)
    if not isinstance(theta, float) or not 1 < theta < math.inf:
        raise metadata.wrong(key, f"is {theta!r}, which is no base of frequencies")
    return theta


def refuse_groups(metadata: Metadata) -> None:
    """Raises UnsupportedModelError if several heads share keys in a model type without KV groups."""
    if GROUPS in metadata.entry.keys or GROUPS in metadata.entry.neutral:
        return
    groups = metadata.take(GROUPS)
    if groups != metadata.count(HEADS, 1):
        raise metadata.beyond(GROUPS, f"is {groups!r}, not the number of heads")
