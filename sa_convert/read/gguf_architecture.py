"""What GGUF calls the metadata and tensors of a kind of models, and what transformers calls them.

Each architecture of GGUF has a file in gguf_architectures/, whose keys are the fields of `Architecture`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sa_convert.families.entries import Entries, made

HOME = Path(__file__).parent / "gguf_architectures"


@dataclass(frozen=True)
class Architecture:
    """One architecture of GGUF, as a model type of transformers.

    A file's `general.architecture` chooses it. What it does not name is refused by `gguf_config` and `gguf_tensors`, so
    that nothing which llama.cpp computes with is lost unsaid.
    """

    model_type: str
    """As transformers calls it."""
    keys: Mapping[str, str]
    """Config keys by metadata key, which is told without the architecture's name. If two metadata keys stand for one
    config key, they must agree."""
    tensors: Mapping[str, str]
    """Module names by GGUF name, without ".weight" or ".bias". {} is the number of the layer, [] of the expert, one
    for each matrix of the tensor. Data files list those of layers ("blk.{}...") as `layers`: see `_architecture`."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Config values that the architecture implies."""
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """By metadata key, the values with which llama.cpp computes what transformers does; others are refused."""
    whole: Mapping[str, str] = field(default_factory=dict)
    """Tensors whose names have no such ending, name by name."""
    biased: tuple[str, ...] = ()
    """Modules, by their GGUF names, that have a bias in every model of the type."""
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Modules that have a bias if a config key is set, by that key."""
    transposed: tuple[str, ...] = ()
    """Modules whose weights transformers keeps with rows and columns exchanged."""
    unsqueezed: Mapping[str, int] = field(default_factory=dict)
    """Modules whose weights get one more dimension, of size 1, and the place of that dimension."""
    single: tuple[str, ...] = ()
    """Modules whose weights stay float32 if the others are float16."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Tensors that change nothing, with the reason."""
    head_size: str = "told"
    """Whether the config tells the size of a head: it does ("told"), it may if that is not hidden size by heads
    ("extra"), or it cannot ("none")."""
    rotary: str = "all"
    """Queries and keys are rotated in "all" of their numbers, in a "part" that the config tells, or not ("none")."""
    scalings: tuple[str, ...] = ("linear", "yarn", "llama3")
    """The ways to scale positions (rope types of transformers) that the config takes."""
    gated: bool = False
    """The gate of the attention's output comes with the queries."""
    window: bool = False
    """The config tells the window of its sliding layers."""
    usual_window: int = 0
    """What llama.cpp takes for a window that is not told; 0: none."""
    layer_types: bool = False
    """The config tells which layers those are."""
    scale: str | None = None
    """The config key of the square of what scores are divided by, if it tells that."""
    scale_by_width: int | None = None
    """Layers of the one model whose scores are divided by the root of hidden size by heads. No key tells it; llama.cpp
    knows it by its depth."""
    local_base: bool = False
    """Sliding layers count tokens by a base of their own, never scaled."""
    always_tied: bool = False
    """The output has the weights of the embedding, and a tensor of its own is a copy of them."""


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


def architectures_in(home: Path) -> Entries[Architecture]:
    """Every architecture of a folder, by its name in GGUF."""
    return Entries(home, _architecture)


def _architecture(name: str, said: dict[str, Any], where: str) -> Architecture:
    """`layers` are tensors of a layer: {"attn_q": "self_attn.q_proj"} in "model.layers", or what `layers_in` says."""
    ours, inside = said.pop("layers", {}), said.pop("layers_in", "model.layers")
    layers = {f"blk.{{}}.{key}": f"{inside}.{{}}.{module}" for key, module in ours.items()}
    return made(Architecture, said | {"tensors": {**said.get("tensors", {}), **layers}}, where)


ARCHITECTURES = architectures_in(HOME)
"""Every architecture that sa-convert reads."""
