"""Finds the arguments of a family's own attention by what they are.

Releases of transformers rename them: what 4.57 calls `past_key_values` is `cache` since 5.24. The code of a checkpoint
cannot follow, so it asks the signature of the class that it derives from: the spellings that are known, then the
annotation, then the word in the name. What it does not know travels on untouched. An argument that it needs and cannot
find is refused when the model is built.
"""

from dataclasses import dataclass, field
from inspect import Parameter, signature

import torch
import transformers

MADE_FOR = ("4.57", "5.24")
"""The first and the last release of transformers that this code was tested on."""

_KNOWN = {
    "cache": ("cache", "past_key_values", "past_key_value", "layer_past"),
    "mask": ("attention_mask", "mask"),
    "positions": ("position_embeddings",),
    "position_ids": ("position_ids",),
    "cache_position": ("cache_position",),
    "source": ("key_value_states",),
    "bias": ("position_bias",),
    "alibi": ("alibi",),
    "residual": ("residual",),
    "output_attentions": ("output_attentions",),
}
"""The spellings of each role that releases used, the newest first."""


def _is_annotated(role: str, parameter: Parameter) -> bool:
    """Whether an argument of unknown name can only be this one, by its annotation or the word in its name."""
    name, annotation = parameter.name, str(parameter.annotation)
    if role == "cache":
        return "Cache" in annotation or ("cache" in name.split("_") and name != "use_cache")
    if role == "positions":
        return "tuple[torch.Tensor, torch.Tensor]" in annotation
    if role == "position_ids":
        return "position" in name and "LongTensor" in annotation
    return role in name.split("_")


@dataclass(frozen=True)
class Call:
    """What an attention module was called with, by role; None where the family or the call has no such thing.

    states: (B, T, hidden). mask: as the family's stack makes it. positions: cosines and sines. source: the encoder's
    states, for cross-attention. bias: of T5's relative positions. rest: the other keywords that the signature does not
    name, which belong to the attention function.
    """

    states: torch.Tensor
    mask: object = None
    cache: object = None
    positions: object = None
    position_ids: object = None
    cache_position: object = None
    source: object = None
    bias: object = None
    alibi: object = None
    residual: object = None
    output_attentions: object = None
    exchange: object = None
    rest: dict = field(default_factory=dict)


class Arguments:
    """The arguments of one attention class: `roles` says under which name its forward takes each.

    needs: the roles that must be there. Raises RuntimeError if one is not.
    """

    def __init__(self, attention: type, needs: tuple[str, ...]):
        parameters = list(signature(attention.forward).parameters.values())[1:]
        named = [item for item in parameters if item.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]
        self._names = [parameter.name for parameter in named]
        self.roles = {"states": self._names[0]}
        self._spellings = {}
        for role, known in _KNOWN.items():
            found = [name for name in known if name in self._names]
            found = found or [item.name for item in named if _is_annotated(role, item) and not self._is_taken(item)]
            if found:
                self.roles[role] = found[0]
                self._spellings.update({name: found[0] for name in known if name not in self._names})

        if missing := [role for role in needs if role not in self.roles]:
            taken = ", ".join(self._names)
            raise RuntimeError(unlike(f"{attention.__name__} takes ({taken}), none of which is the {missing[0]}"))

    def _is_taken(self, parameter):
        """Whether the name has another role; masks and states of the encoder, and heads' masks, have none of ours."""
        known = any(parameter.name in names for names in _KNOWN.values())
        words = parameter.name.split("_")
        return known or parameter.name in self.roles.values() or "encoder" in words or "head" in words

    def by_name(self, args: tuple, kwargs: dict) -> dict:
        """All arguments of a call under the names of the signature, older spellings of it included."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        for other in [name for name in given if name in self._spellings and not is_paged(given[name])]:
            value = given.pop(other)
            given.setdefault(self._spellings[other], value)
        return given

    def by_role(self, given: dict, exchange: str) -> Call:
        """Arguments by name as a `Call`; exchange: the keyword under which loans travel."""
        roles = {role: given.get(name) for role, name in self.roles.items()}
        rest = {name: value for name, value in given.items() if name not in self._names and name != exchange}
        return Call(**roles, exchange=given.get(exchange), rest=rest)


def is_paged(value) -> bool:
    """Whether this is the cache of continuous batching, which shares no class with the others."""
    return not isinstance(value, torch.Tensor) and "Paged" in type(value).__name__


def take_paged(arguments: dict):
    """Take the cache of continuous batching out of an attention function's keywords, if it is there (until 5.23)."""
    name = next((name for name, value in arguments.items() if is_paged(value)), None)
    return None if name is None else arguments.pop(name)


def unlike(what: str) -> str:
    """The message for a transformers in which something that this code needs is not what it was."""
    return (
        f"shared_attention: {what} in transformers {transformers.__version__}. This checkpoint's code was made for "
        f"transformers {MADE_FOR[0]} to {MADE_FOR[1]}: install one of those, or convert the base model again with a "
        "newer sa-convert."
    )


def is_newer() -> bool:
    """Whether this transformers is newer than the last that this code was tested on."""
    release = transformers.__version__.split(".")[:2]
    return [int("".join(filter(str.isdigit, part)) or 0) for part in release] > [int(n) for n in MADE_FOR[1].split(".")]
