"""The layers of a cache as data, and a cache made of that data again, for every kind that a session can keep.

A layer is an object of transformers with attributes. Converted models put classes of their own in front of some: layers
of *parts* (windows keep KV groups in rings of slots), and layers that only *count* tokens (no attention). These classes
travel with the model, so they are found in the code that it runs by, never by a name in a file.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch

from sa_convert.errors import SessionError
from sa_convert.sessions.tree import Decoder, Tensors, cut, encoded

_LEFT_OUT = frozenset({"config", "shared_attention_rooms", "until"})
"""Attributes of layers that are made again when they are missed."""

_KINDS = {"parted": "PartedLayer", "counted": "Counted"}
"""Classes of ours that come in front of those of transformers."""

_MAKER = "in_front"
"""The function of our code that puts them there."""


def layers_of(cache: Any) -> list[Any]:
    """Raises SessionError for a cache that cannot be kept: of an encoder-decoder, quantised, or of unknown make."""
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list) or not layers:
        raise SessionError(
            f"{type(cache).__name__} is no cache that a session can keep: use a dynamic or a static cache that a model "
            "without an encoder has filled."
        )
    for number, layer in enumerate(layers):
        if "Quantized" in _whole(layer).__name__:
            raise SessionError(
                f"Layer {number} of the cache is quantised, which no session can keep: use a dynamic or a static cache."
            )
    return layers


def is_static(cache: Any) -> bool:
    return any(hasattr(layer, "max_cache_len") for layer in cache.layers)


def room_of(cache: Any) -> int:
    """Tokens that a static cache has room for."""
    return max(int(layer.max_cache_len) for layer in cache.layers if hasattr(layer, "max_cache_len"))


def told(cache: Any) -> tuple[list[dict[str, Any]], Tensors]:
    """What JSON says of each layer, and the tensors by name, in the order of the layers. Raises SessionError.

    Tensors are the cache's own, or views of them: nothing is copied here.
    """
    found, tensors = [], Tensors()
    for number, layer in enumerate(layers_of(cache)):
        state = {
            key: encoded(value, f"{number}.{key}", tensors)
            for key, value in vars(layer).items()
            if key not in _LEFT_OUT
        }
        if hasattr(layer, "max_cache_len") and not getattr(layer, "is_sliding", False):
            for slot in ("keys", "values"):  # the first tokens are there, the others are room
                if isinstance(state.get(slot), dict):
                    cut(tensors, state[slot], 2, int(layer.get_seq_length()))
        _without_log(state.get("parts"), tensors)
        found.append({"class": _whole(layer).__name__, "kind": _kind(layer), "state": state})
    return found, tensors


def _without_log(part: Any, tensors: Tensors) -> None:
    """Of windows that are kept, only the slots of sinks and window: those behind them hold tokens that have left, in
    case that the last ones are taken back, which then is refused until new ones have come. part: in place."""
    for branch in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        _without_log(branch, tensors)
    if isinstance(part, dict) and part.get("object") == "Kept" and not isinstance(part["state"]["length"], dict):
        state = part["state"]
        slots = state["sinks"] + state["window"]
        for slot, at, fill in (("keys", 2, 0), ("values", 2, 0), ("places", 1, -1)):
            if state[slot] is not None:
                cut(tensors, state[slot], at, slots, fill)
        state["lost"] = max(state["lost"], state["length"] - state["window"])


def restored(fresh: Any, layers: list[dict[str, Any]], tensors: Mapping[str, torch.Tensor], model: Any) -> Any:
    """A cache that holds what `told` said. fresh: an empty one of the same kind, made for the model.

    Raises KeyError, TypeError or ValueError if the data is not what `told` writes, or not of such a cache.
    """
    makers, classes, devices = _code_of(model)
    if len(layers) != len(fresh.layers):
        raise ValueError("layers")
    for number, described in enumerate(layers):
        layer, kind = fresh.layers[number], described["kind"]
        if type(layer).__name__ != described["class"]:
            raise TypeError(f"layer {number}: {type(layer).__name__} and not {described['class']}")
        if kind != "plain":
            made = makers[_MAKER](makers[_KINDS[kind]], type(layer))
            if kind == "counted":
                layer = fresh.layers[number] = made.__new__(made)
            else:
                layer.__class__ = made
        decoder = Decoder(tensors, classes, devices.get(number, model.device))
        layer.__dict__.update({key: decoder.value(value) for key, value in described["state"].items()})
        if hasattr(layer, "max_cache_len"):
            for value in vars(layer).values():
                if isinstance(value, torch.Tensor):
                    torch._dynamo.mark_static_address(value)
    return fresh


def attentions_in(model: Any) -> dict[int, Any]:
    """The attention modules of a converted model that its plan touches, by layer; none of a base model."""
    modules = (module for module in model.modules() if hasattr(getattr(module, "plan", None), "treatments"))
    return {module.plan.layer: module for module in modules}


def _code_of(model: Any) -> tuple[dict[str, Any], dict[str, type], dict[int, torch.device]]:
    """Of the code that a converted model runs by, what makes classes of layers, and the classes of parts;
    and on which device each layer is."""
    plans = [module.plan for module in attentions_in(model).values()]
    own = {type(treatment).__module__ for plan in plans for treatment in plan.treatments}
    packages = {type(plan).__module__.rpartition(".")[0] for plan in plans}
    beside = [module for name, module in list(sys.modules.items()) if name.rpartition(".")[0] in packages]
    makers = {
        name: getattr(module, name) for module in beside for name in (_MAKER, *_KINDS.values()) if hasattr(module, name)
    }
    classes = {
        name: kind
        for module in own
        for name, kind in vars(sys.modules[module]).items()
        if isinstance(kind, type) and kind.__module__ == module
    }
    layers = getattr(model.get_decoder(), "layers", None) if hasattr(model, "get_decoder") else None
    devices = {
        number: parameter.device
        for number, layer in enumerate(layers if layers is not None else ())
        if (parameter := next(layer.parameters(), None)) is not None and not parameter.is_meta
    }
    return makers, classes, devices


def _kind(layer: Any) -> str:
    """Which class of ours comes first, or "plain"."""
    ours = type(layer).__bases__[0].__name__
    return next((kind for kind, name in _KINDS.items() if name == ours), "plain")


def _whole(layer: Any) -> type:
    """The class of transformers behind those of ours."""
    return type(layer) if _kind(layer) == "plain" else type(layer).__bases__[1]
