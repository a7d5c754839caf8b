"""Configuration of models whose attention was changed.

A model of base type T has the type `shared_attention_T`, all keys of its base, and one more, `shared_attention`: what
is done to which layer's KV groups (`layers`), what the model's parts are called (`modules`), and options of treatments.
"""

from inspect import signature

import transformers


def _rope_of_transformers_4(parameters):
    """The keys that transformers 4 reads for the `rope_parameters` of transformers 5."""
    if all(isinstance(value, dict) for value in parameters.values()):  # a set for each attention type (Gemma 3)
        keys = _rope_of_transformers_4(parameters["full_attention"])
        if "sliding_attention" in parameters:
            keys["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        return keys
    rest = dict(parameters)
    keys = {name: rest.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rest}
    return {**keys, "rope_scaling": None if rest.get("rope_type", "default") == "default" else rest}


class Named(dict):
    """A mapping whose keys are attributes, too."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


class TreatedConfig:
    """In front of a configuration class of transformers. needs_5: the first release that runs such a model is 5."""

    needs_5 = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.needs_5 and transformers.__version__.startswith("4."):
            raise ImportError(
                f"Models of type {cls.model_type} need transformers 5, this is {transformers.__version__}: "
                "run pip install -U transformers."
            )
        if TreatedConfig in cls.__bases__:
            cls.base_class = cls.__bases__[1]

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        known, keys = signature(cls.base_class.__init__).parameters, dict(config_dict)
        if "rope_theta" in known and keys.get("rope_parameters"):
            keys = {**_rope_of_transformers_4(keys.pop("rope_parameters")), **keys}
        if "rope_theta" in known and "num_experts" in known and "num_local_experts" in keys:
            keys.setdefault("num_experts", keys["num_local_experts"])
        if "block_configs" in keys:  # so engines read what they know as DeciLMForCausalLM
            blocks = [{name: Named(part) for name, part in block.items()} for block in keys["block_configs"]]
            keys["block_configs"] = [Named(block) for block in blocks]
        return super().from_dict(keys, **kwargs)
