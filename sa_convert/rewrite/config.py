"""The configuration of a converted model."""

from typing import Any

from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.domain.plan import Plan
from sa_convert.families.family import CLASS_PREFIX, PREFIX, Family
from sa_convert.families.model_classes import model_classes_of
from sa_convert.read.family_of import architecture_of
from sa_convert.read.geometry_of import geometry_of


def converted_config(checkpoint: Checkpoint, family: Family, plan: Plan) -> dict[str, Any]:
    """The base's config.json with our model type, the code to load it with, and the plan; the rest stays.

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
        "shared_attention": attention_entry(checkpoint, family, plan),
    }


def attention_entry(checkpoint: Checkpoint, family: Family, plan: Plan) -> dict[str, Any]:
    """What config.json has under `shared_attention`.

    Version 1, which lists whole layers, until the code that travels reads version 2.
    """
    return version_1(checkpoint, family, plan)


def version_2(family: Family, plan: Plan) -> dict[str, Any]:
    """{"layers": {"27": {"0": {"share": [[26, 4], null]}}}}: treatments by KV group; and what the code that travels has
    to know of the family."""
    return {"version": 2, "modules": family.modules.to_json(), "layers": plan.to_json()}


def version_1(checkpoint: Checkpoint, family: Family, plan: Plan) -> dict[str, Any]:
    """{"layers": {"27": [[26, 4], null, ...]}}: the sources of all heads of a layer. For plans that only share."""
    layers = {}
    geometry = geometry_of(checkpoint, family) if plan else None
    for index, groups in plan.groups_of("share").items():
        assert geometry is not None
        layer = geometry.layers[index]
        rows = [groups.get(group, (None,) * layer.group_size) for group in range(layer.groups)]
        layers[plan.label(index)] = [source and list(source) for row in rows for source in row]
    return {"layers": layers}
