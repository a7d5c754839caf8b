"""The configuration of a converted model."""

from typing import Any

from sa_convert.data.checkpoint import Checkpoint
from sa_convert.data.sharing_map import SharingMap
from sa_convert.export.shared_attention_families import PREFIX, Family, auto_classes_of
from sa_convert.read.family import architecture_of


def converted_config(checkpoint: Checkpoint, family: Family, sharing: SharingMap) -> dict[str, Any]:
    """The base's config.json with our model type, the code to load it with, and the sharing map; the rest stays."""
    architecture = architecture_of(checkpoint.config, family)
    reference = f"modeling_shared_attention.SharedAttention{architecture}"
    return dict(checkpoint.config) | {
        "model_type": PREFIX + family.model_type,
        "architectures": [f"SharedAttention{architecture}"],
        "auto_map": {
            "AutoConfig": f"configuration_shared_attention.SharedAttention{family.config_class}",
            **dict.fromkeys(auto_classes_of(family, architecture), reference),
        },
        "shared_attention": {"layers": sharing.to_json()},
    }
