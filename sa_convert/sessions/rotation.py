"""Turns cached keys to other positions, by the family's own function, and says if that cannot be done.

A rotary key at position p is R(p) k. To stand at p - d it is turned by the difference: R(-d) R(p) k = R(p - d) k, which
holds for every text. Models whose attention sees distances alone (ALiBi) need nothing. What cannot be moved: keys made
of positions that were added to the hidden states, and rotations whose frequencies depend on the length of the text.

Letters in shape comments: B rows, G KV groups, S tokens, D numbers of a key.
"""

import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from sa_convert.errors import SessionError
from sa_convert.families.family import PREFIX, Family
from sa_convert.families.table import family_named

_TOLERANCE = 1e-3
"""What rounding may make of keys of size 1 in float32, at positions of some thousands."""

_BY_LENGTH = ("dynamic", "longrope")
"""Kinds of rotary positions whose frequencies depend on the length of the text."""


class Rotation:
    """How a model turns keys. Raises SessionError for one whose cached keys cannot be moved."""

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config(decoder=True)
        kind = str(config.model_type).removeprefix(PREFIX)
        family = family_named(kind)
        if family is None or model.config.is_encoder_decoder:
            raise _refused(kind, "sa-convert does not know how it counts positions")
        self._turners: dict[int, Any] = {}
        self._stack: Any = None
        if kind == "bloom" or getattr(config, "alibi", False):
            return
        if family.modules.rotary == "none":
            raise _refused(kind, "positions are added to what keys are made of")
        if family.turning is not None:
            raise _refused(kind, family.turning)
        for told in _scalings(config):
            if told.get("rope_type", told.get("type")) in _BY_LENGTH:
                raise _refused(kind, "its rotary frequencies depend on the length of the text")
        self._find(model, family, config)
        self._try()

    def back(self, layer: int, keys: torch.Tensor, tokens: int) -> torch.Tensor:
        """Keys (B, G, S, D) as they would be so many positions earlier. They are computed in float32."""
        turner = self._turners.get(layer)
        if turner is None or not keys.numel():
            return keys
        cos, sin = self._turns(turner, keys, tokens)
        turned = turner.turn(keys.float(), (cos, sin), back=True)
        scale = (cos * cos + sin * sin)[0, 0, 0]
        if not bool(torch.isclose(scale, torch.ones_like(scale), atol=1e-6)):  # families that scale as they turn (yarn)
            turned = turner.turn(turned, self._turns(turner, keys, 0))
        return turned.to(keys.dtype)

    def _find(self, model: Any, family: Family, config: Any) -> None:
        """A turner for each layer that turns."""
        from sa_convert.treatments.low_rank.runtime import Turner

        path = _path_in(model, family.modules.layers)
        self._stack = model.get_submodule(path.rpartition(".")[0])
        names = SimpleNamespace(rotary=family.modules.rotary)
        for number, layer in enumerate(model.get_submodule(path)):
            try:
                attention = layer.get_submodule(family.modules.attention)
            except AttributeError:  # a layer without softmax attention
                continue
            kinds = (each for each in type(attention).__mro__ if each.__module__.startswith("transformers.models"))
            module = sys.modules[next(kinds).__module__]
            size = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None) or attention.size
            turner = Turner(module, names, attention, number, config, size)
            if turner.lacking:
                raise _refused(family.model_type, f"{module.__name__} has no apply_rotary_pos_emb")
            if turner.rotates:
                self._turners[number] = turner
                self._size = size

    def _try(self) -> None:
        """Whether turning by a difference is what this model's positions mean, on random keys."""
        for turner in {turner.kind: turner for turner in self._turners.values()}.values():
            keys = torch.randn(1, 1, 1, self._size, generator=torch.Generator().manual_seed(0))
            at, difference = 1500, 1000
            here = turner.turn(keys, self._turns(turner, keys, at))
            wanted = turner.turn(keys, self._turns(turner, keys, at - difference))
            number = next(number for number, other in self._turners.items() if other is turner)
            if not torch.allclose(self.back(number, here, difference), wanted, atol=_TOLERANCE):
                raise _refused(self._stack.config.model_type, "its rotary positions are not differences")

    def _turns(self, turner: Any, keys: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        from sa_convert.treatments.low_rank.runtime import cosines

        embedding = self._stack.rotary_emb
        device = next(iter(embedding.buffers()), keys).device
        positions = torch.full((1, keys.shape[-2]), position, device=device)
        cos, sin = cosines(self._stack, torch.zeros(1, device=device), positions, turner.kind)
        return cos.to(keys.device), sin.to(keys.device)


def _refused(kind: str, why: str) -> SessionError:
    return SessionError(
        f"The cache of a {kind} model cannot be moved to other positions: {why}. Compute what is left of the text "
        "again."
    )


def _scalings(config: Any) -> list[Mapping[str, Any]]:
    told = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [told, *(part for part in told.values() if isinstance(part, dict))]


def _path_in(model: Any, path: str) -> str:
    """Where this model has the layers: some heads call the language model otherwise."""
    rest, base = path.partition(".")[2], model.base_model_prefix
    for name in (path, rest, f"{base}.{rest}", f"{base}.{path}"):
        try:
            model.get_submodule(name)
            return name
        except AttributeError:
            continue
    raise _refused(model.config.model_type, f"it has no {path}")
