"""Configuration of models that share attention across layers.

A model of base type T has the type `shared_attention_T`, all keys of its base, and one more:

    "shared_attention": {"layers": {"27": [[26, 4], null, ...]}}

For each reusing layer it lists, per query head, null (the head owns its attention) or the source layer and source head.
Two optional keys say how sharing is computed (`shared_attention_attend`): "form" is "auto" (the default), "weights" or
"queries"; "weights_memory" is how many bytes lent probabilities may take at any one time in "auto".

The class `SharedAttention<Base>Config` exists for every `<Base>Config` that `shared_attention_families` names; it is
made when it is first asked for.
"""

from functools import cache
from inspect import signature

import transformers

from .shared_attention_families import CLASS_PREFIX, FAMILIES, PREFIX, Family


def _rope_of_transformers_4(parameters: dict) -> dict:
    """The keys that transformers 4 reads for the `rope_parameters` of transformers 5."""
    if all(isinstance(value, dict) for value in parameters.values()):
        # One set of parameters per attention type (Gemma 3).
        keys = _rope_of_transformers_4(parameters["full_attention"])
        if "sliding_attention" in parameters:
            keys["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        return keys
    rest = dict(parameters)
    keys = {name: rest.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rest}
    keys["rope_scaling"] = None if rest.get("rope_type", "default") == "default" else rest
    return keys


def _init_of_transformers_4(base, known):
    def __init__(self, **kwargs):
        parameters = kwargs.pop("rope_parameters", None)
        if parameters:
            kwargs = {**_rope_of_transformers_4(parameters), **kwargs}
        if "num_experts" in known and "num_local_experts" in kwargs:
            kwargs.setdefault("num_experts", kwargs["num_local_experts"])
        base.__init__(self, **kwargs)

    return __init__


@cache
def config_class_of(family: Family) -> type:
    """The configuration class of a family: its base's, with our model type.

    Raises ImportError where the family needs transformers 5 and this is 4.
    """
    if family.transformers_5 and transformers.__version__.startswith("4."):
        raise ImportError(
            f"Models of type {PREFIX}{family.model_type} need transformers 5, this is {transformers.__version__}: "
            "run pip install -U transformers."
        )
    base = getattr(transformers, family.config_class)
    members = {"model_type": PREFIX + family.model_type, "__module__": __name__}
    known = signature(base.__init__).parameters
    if "rope_theta" in known:
        members["__init__"] = _init_of_transformers_4(base, known)
    return type(CLASS_PREFIX + family.config_class, (base,), members)


def __getattr__(name: str):
    for family in FAMILIES.values():
        if name == CLASS_PREFIX + family.config_class:
            return config_class_of(family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
