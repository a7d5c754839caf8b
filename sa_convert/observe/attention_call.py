"""One call of a layer's attention, whose probabilities can be computed whenever they are needed.

Letters in shape comments: B sequences, H query heads, G KV groups, T and S tokens, D head size.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Call:
    """query: (B, H, T, D). key: (B, G, S, D). mask: added to scores. arguments: of the family's attention function."""

    module: Any
    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None
    arguments: Mapping[str, Any]

    def probabilities(self) -> torch.Tensor:
        """(B, H, T, S), by the family's own eager function, which applies its softcap and sinks."""
        # Zero-width values: only the probabilities are wanted here.
        nothing = self.key[..., :0]
        output = eager_of(self.module)(self.module, self.query, self.key, nothing, self.mask, **self.arguments)
        probabilities: torch.Tensor = output[1]
        return probabilities

    def rows(self, start: int, stop: int, causal: bool) -> "Call":
        """The queries from `start` to `stop` alone; causal: with the keys up to the last of them, which are all that
        they may see."""
        tokens, length = self.query.shape[-2], self.key.shape[-2]
        end = length - tokens + stop if causal else length

        def part(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.dim() < 3:
                return value
            if value.shape[-2] == tokens and value.shape[-1] >= length:
                value = value[..., start:stop, :]
            return value[..., :end] if value.shape[-1] >= length else value

        return replace(
            self,
            query=self.query[:, :, start:stop],
            key=self.key[:, :, :end],
            mask=part(self.mask),
            arguments={name: part(value) for name, value in self.arguments.items()},
        )

    def lasting(self) -> "Call":
        """The same, though the module's own parameters may leave the memory."""
        return replace(self, module=_Snapshot(self.module))


class _Snapshot:
    """A module whose own parameters (sinks) are kept as they are."""

    def __init__(self, module: Any) -> None:
        self.module = module
        for name, parameter in module.named_parameters(recurse=False):
            setattr(self, name, parameter.detach().clone())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)


def eager_of(module: Any) -> Callable[..., Any]:
    """The eager attention function of a module's family."""
    ours: Callable[..., Any] | None = getattr(module, "family_eager", None)
    if ours is not None:
        return ours
    for kind in type(module.module if isinstance(module, _Snapshot) else module).__mro__:
        function = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if function is not None:
            eager: Callable[..., Any] = function
            return eager
    raise LookupError(f"{type(module).__name__} has no eager attention function")
