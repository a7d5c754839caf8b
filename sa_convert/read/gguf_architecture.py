"""What GGUF calls the metadata and tensors of a kind of models, and what transformers calls them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """One architecture of GGUF, as a model type of transformers.

    A file's `general.architecture` chooses it. What it does not name is refused by `gguf_config` and `gguf_tensors`, so
    that nothing which llama.cpp computes with is lost unsaid.

    keys: config keys by metadata key, which is told without the architecture's name. Two metadata keys that stand for
    one config key must agree.
    fixed: config values that the architecture implies.
    neutral: by metadata key, the values with which llama.cpp computes what transformers does; others are refused.
    tensors: module names by GGUF name, without ".weight" or ".bias". {} is the number of the layer; [] that of the
        expert, one for each matrix of the tensor.
    whole: tensors whose names have no such ending, name by name.
    biased: modules, by their GGUF names, that have a bias in every model of the type.
    biases: modules that have a bias if a config key is set, by that key.
    transposed: modules whose weights transformers keeps with rows and columns exchanged.
    unsqueezed: modules whose weights get one more dimension, of size 1, and the place of that dimension.
    single: modules whose weights stay float32 where the others are float16.
    left_out: tensors that change nothing, with the reason.
    head_size: the config tells the size of a head ("told"), or may tell it if it is not hidden size by heads ("extra"),
        or cannot ("none").
    rotary: queries and keys are rotated in "all" of their numbers, in a "part" that the config tells, or not ("none").
    scalings: the ways to scale positions (rope types of transformers) that the config takes.
    window: the config tells the window of its sliding layers; layer_types: and which layers those are.
    scale: the config tells the square of what scores are divided by, under this key.
    always_tied: the output has the weights of the embedding, and a tensor of its own is a copy of them.
    """

    model_type: str
    keys: Mapping[str, str]
    tensors: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)
    biased: tuple[str, ...] = ()
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    unsqueezed: Mapping[str, int] = field(default_factory=dict)
    single: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    head_size: str = "told"
    rotary: str = "all"
    scalings: tuple[str, ...] = ("linear", "yarn", "llama3")
    window: bool = False
    layer_types: bool = False
    scale: str | None = None
    always_tied: bool = False


NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "router_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "attention.output_scale": (0.0, 1.0),
    "attention.temperature_scale": (0.0,),
    "attention.shared_kv_layers": (0,),
    "leading_dense_block_count": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0, 1),
    "expert_feed_forward_length": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "moe_every_n_layers": (0, 1),
    "interleave_moe_layer_step": (0, 1),
    "nextn_predict_layers": (0,),
    "pooling_type": (0, 1, 2, 3),  # only for embeddings of whole texts
    "swin_norm": (False,),
    "rescale_every_n_layers": (0,),
}
"""Values with which a key of any architecture changes nothing: the feature that it tells of is off."""
