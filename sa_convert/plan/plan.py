"""The plan of a conversion: everything that is decided and checked before the first byte is written."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sa_convert.domain.checkpoint import Checkpoint, TensorEdit
from sa_convert.domain.geometry import ModelGeometry
from sa_convert.domain.model import Model
from sa_convert.domain.report import Savings
from sa_convert.domain.sharing_map import SharingMap
from sa_convert.errors import RecipeError
from sa_convert.families.family import Family
from sa_convert.treatments.share.edits import tensor_edits
from sa_convert.treatments.share.rules import check_map
from sa_convert.treatments.share.savings import plan_savings

if TYPE_CHECKING:
    from sa_convert.domain.recipe import Recipe


@dataclass(frozen=True)
class ConversionPlan:
    """A checkpoint, the sharing map for it, what happens to each tensor, and what that saves."""

    checkpoint: Checkpoint
    family: Family
    geometry: ModelGeometry
    sharing: SharingMap
    edits: Mapping[str, TensorEdit]
    savings: Savings

    @property
    def reused_groups(self) -> int:
        return self.sharing.reused_groups(self.geometry)


def plan_conversion(model: Model, recipe: "Recipe", sharing: SharingMap | None = None) -> ConversionPlan:
    """Resolve a recipe for a checkpoint. sharing: the map that a search has found, or None for the recipe's own.

    Raises RecipeError for what the recipe asks, SharingError where the resulting map breaks a rule.
    """
    from sa_convert.treatments.share.spans import sharing_of

    sharing = sharing or sharing_of(recipe, model.geometry)
    check_map(sharing, model.geometry)
    if not sharing.layers:
        raise RecipeError(
            f"{recipe.origin.at('sharing')}: no head reuses another, so there is nothing to convert; "
            "name at least one source."
        )
    return plan_sharing(model.checkpoint, model.family, model.geometry, sharing)


def plan_sharing(
    checkpoint: Checkpoint, family: Family, geometry: ModelGeometry, sharing: SharingMap
) -> ConversionPlan:
    """The plan for a map that has been checked."""
    edits = tensor_edits(checkpoint, family, geometry, sharing)
    savings = plan_savings(checkpoint, family, geometry, sharing, edits)
    return ConversionPlan(checkpoint, family, geometry, sharing, edits, savings)
