"""How layers of a base model that runs turn keys by position."""

import sys
from types import SimpleNamespace
from typing import Any

import torch

from sa_convert.families.family import Family


class Turning:
    """Notes the cosines and sines that each layer is given in a pass."""

    def __init__(self, model: Any, family: Family) -> None:
        self.model, self.family = model, family
        self._attentions: list[Any] = []
        self._turners: dict[int, Any] = {}
        self._given: dict[int, Any] = {}

    def add(self, attention: Any) -> None:
        """The next layer's attention, or None if it has none."""
        layer = len(self._attentions)
        self._attentions.append(attention)
        if attention is None or self.family.modules.rotary == "none" or self.family.turning is not None:
            return

        def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            pairs = (given for given in (*args, *kwargs.values()) if isinstance(given, tuple) and len(given) >= 2)
            found = next((pair for pair in pairs if all(isinstance(part, torch.Tensor) for part in pair[:2])), None)
            self._given[layer] = None if found is None else tuple(part.detach() for part in found[:2])

        attention.register_forward_pre_hook(note, with_kwargs=True)

    def turned(self, layer: int, keys: torch.Tensor, back: bool) -> torch.Tensor:
        """Keys (B, G, S, D) or (G, S, D), turned or turned back as in the last pass."""
        turns = self._given.get(layer)
        if turns is None:
            return keys
        if keys.ndim == 3:
            return self.turned(layer, keys[None], back)[0]
        if layer not in self._turners:
            self._turners[layer] = self._turner(layer, keys.shape[-1])
        found: torch.Tensor = self._turners[layer].turn(keys, turns, back)
        return found

    def _turner(self, layer: int, size: int) -> Any:
        from sa_convert.treatments.low_rank.runtime import Turner

        attention = self._attentions[layer]
        kinds = (kind for kind in type(attention).__mro__ if kind.__module__.startswith("transformers."))
        module = sys.modules[next(kinds).__module__]
        names = SimpleNamespace(rotary=self.family.modules.rotary)
        return Turner(module, names, attention, 0, None, size)
