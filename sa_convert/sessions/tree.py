"""What a layer of a cache holds, as JSON and tensors, and back: attributes, and those of objects in them.

    None, numbers, text             as they are
    tensor                          {"tensor": its name in the file}, with "room" if only its first tokens are there
    tuple, list                     {"tuple": [...]}, {"list": [...]}
    mapping                         {"map": [[key, value], ...]}
    torch.dtype, torch.device       {"dtype": "float32"}, {"device": true}: that of the model that reads it
    part of a treatment             {"object": name of its class, "state": attributes}

No class is looked up by a name in a file but those that the caller gives.
"""

from collections.abc import Mapping
from typing import Any

import torch

from sa_convert.errors import SessionError

Tensors = dict[str, torch.Tensor]


def encoded(value: Any, name: str, tensors: Tensors) -> Any:
    """What goes into JSON; tensors are added to `tensors`, under names that begin with `name`.

    Raises SessionError for what cannot be kept.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [encoded(part, f"{name}.{place}", tensors) for place, part in enumerate(value)]}
    if isinstance(value, dict):
        return {
            "map": [
                [encoded(key, f"{name}.key{place}", tensors), encoded(part, f"{name}.{place}", tensors)]
                for place, (key, part) in enumerate(value.items())
            ]
        }
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": True}
    if type(value).__module__.startswith(("sa_convert.", "transformers_modules.")) and hasattr(value, "__dict__"):
        state = {key: encoded(part, f"{name}.{key}", tensors) for key, part in vars(value).items()}
        return {"object": type(value).__name__, "state": state}
    raise SessionError(
        f"The cache holds {type(value).__name__} at {name}, which no session can keep: use a dynamic or a static cache."
    )


class Decoder:
    """The way back. tensors: by name. classes: those that objects may have, by name. device: where tensors go."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], classes: Mapping[str, type], device: torch.device) -> None:
        self.tensors, self.classes, self.device = tensors, classes, device

    def value(self, told: Any) -> Any:
        """Raises KeyError, TypeError or ValueError for what `encoded` does not write."""
        if not isinstance(told, dict):
            return told
        if "tensor" in told:
            return self._tensor(told)
        if "tuple" in told:
            return tuple(self.value(part) for part in told["tuple"])
        if "list" in told:
            return [self.value(part) for part in told["list"]]
        if "map" in told:
            return {self.value(key): self.value(part) for key, part in told["map"]}
        if "dtype" in told:
            return _dtype(told["dtype"])
        if "device" in told:
            return self.device
        made: Any = object.__new__(self.classes[told["object"]])
        made.__dict__.update({key: self.value(part) for key, part in told["state"].items()})
        return made

    def _tensor(self, told: Mapping[str, Any]) -> torch.Tensor:
        """A tensor of which only the first tokens are in the file gets its whole room again."""
        tensor = self.tensors[told["tensor"]].to(self.device)
        if "room" not in told:
            return tensor
        at, shape = told["at"], list(tensor.shape)
        whole = tensor.new_full((*shape[:at], told["room"], *shape[at + 1 :]), told["fill"])
        whole.narrow(at, 0, shape[at]).copy_(tensor)
        return whole


def cut(tensors: Tensors, told: Any, at: int, tokens: int, fill: int = 0) -> None:
    """Keep only the first tokens of a tensor that `encoded` has told of; what is behind them is `fill` when it is read.
    at: the dimension. told: in place."""
    tensor = tensors[told["tensor"]]
    if tokens < tensor.shape[at]:
        told |= {"room": tensor.shape[at], "at": at, "fill": fill}
        tensors[told["tensor"]] = tensor.narrow(at, 0, tokens)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(name)
    return found
