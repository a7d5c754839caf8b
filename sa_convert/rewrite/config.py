"""The configuration of a converted model."""

from typing import Any

from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.domain.plan import Plan
from sa_convert.domain.stock import StockForm
from sa_convert.families.family import CLASS_PREFIX, PREFIX, Family
from sa_convert.families.model_classes import model_classes_of
from sa_convert.read.family_of import architecture_of
from sa_convert.rewrite.carried import auto_map


def classes_in(checkpoint: Checkpoint, family: Family) -> dict[str, str]:
    """The base's model class for each auto class that loads it, first those for the checkpoint's own class."""
    return model_classes_of(family, architecture_of(checkpoint.config, family))


def converted_config(
    checkpoint: Checkpoint, family: Family, plan: Plan, stock: StockForm | None = None
) -> dict[str, Any]:
    """The base's config.json with our model type, the code to load it with, and the plan; the rest stays.

    `auto_map` names every auto class that loads the base. stock: how a class of an engine is told the plan, too; None:
    it is not. The engine's class comes after ours under `architectures`: transformers and sa-convert go by the first.
    """
    if stock is not None:
        found = converted_config(checkpoint, family, plan)
        told = found["shared_attention"]
        return found | {
            **stock.config,
            "architectures": [*found["architectures"], *stock.config["architectures"]],
            "shared_attention": {**told, "modules": {**told["modules"], **stock.modules}},
        }
    return dict(checkpoint.config) | {
        "model_type": PREFIX + family.model_type,
        "architectures": [f"{CLASS_PREFIX}{architecture_of(checkpoint.config, family)}"],
        "auto_map": auto_map(family, classes_in(checkpoint, family)),
        "shared_attention": version_2(family, plan),
    }


def version_2(family: Family, plan: Plan) -> dict[str, Any]:
    """{"layers": {"27": {"0": {"share": [[26, 4], null]}}}}: treatments by KV group; and what the code that travels has
    to know of the family."""
    return {"version": 2, "modules": family.modules.to_json(), "layers": plan.to_json()}
