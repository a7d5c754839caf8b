"""The configuration of a converted model."""

from typing import Any

from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.domain.sharing_map import SharingMap
from sa_convert.families.family import CLASS_PREFIX, PREFIX, Family
from sa_convert.families.model_classes import model_classes_of
from sa_convert.read.family_of import architecture_of


def converted_config(checkpoint: Checkpoint, family: Family, sharing: SharingMap) -> dict[str, Any]:
    """The base's config.json with our model type, the code to load it with, and the sharing map; the rest stays.

    `auto_map` names every auto class that loads the base, first the one for the checkpoint's own class.
    """
    architecture = architecture_of(checkpoint.config, family)
    classes = model_classes_of(family, architecture)
    return dict(checkpoint.config) | {
        "model_type": PREFIX + family.model_type,
        "architectures": [f"{CLASS_PREFIX}{architecture}"],
        "auto_map": {
            "AutoConfig": f"configuration_shared_attention.{CLASS_PREFIX}{family.config_class}",
            **{name: f"modeling_shared_attention.{CLASS_PREFIX}{found}" for name, found in classes.items()},
        },
        "shared_attention": {"layers": sharing.to_json()},
    }
