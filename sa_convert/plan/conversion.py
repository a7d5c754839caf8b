"""The plan of a conversion: everything that is decided and checked before the first byte is written."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sa_convert.domain.checkpoint import TensorEdit
from sa_convert.domain.model import Model
from sa_convert.domain.plan import Plan
from sa_convert.domain.report import Savings
from sa_convert.domain.treated import Treated
from sa_convert.errors import RecipeError
from sa_convert.plan.savings import plan_savings
from sa_convert.treatments.registry import treatments, used_in
from sa_convert.treatments.tensor_edits import plan_edits

if TYPE_CHECKING:
    from sa_convert.domain.recipe import Recipe


@dataclass(frozen=True)
class ConversionPlan:
    """A model, the plan for it, what happens to each tensor, and what that saves."""

    model: Model
    plan: Plan
    edits: Mapping[str, TensorEdit]
    savings: Savings

    @property
    def treated(self) -> tuple[Treated, ...]:
        """What each treatment says of it."""
        return treated_by(self.plan, self.model)


def plan_conversion(model: Model, recipe: "Recipe", plan: Plan | None = None) -> ConversionPlan:
    """Resolve a recipe for a model. plan: the one that a search has found, or None for the recipe's own.

    Raises RecipeError for what the recipe asks, PlanError if the resulting plan breaks a rule.
    """
    plan = plan or planned(recipe, model)
    check_plan(plan, model)
    if not plan:
        raise RecipeError(
            f"{recipe.origin.at('sharing')}: no head reuses another, so there is nothing to convert; "
            "name at least one source."
        )
    edits = plan_edits(model, plan)
    return ConversionPlan(model, plan, edits, plan_savings(model, plan, edits))


def planned(recipe: "Recipe", model: Model) -> Plan:
    """The plan that a recipe spells out. Raises RecipeError, naming the line, and PlanError."""
    found = (treatment.from_recipe(recipe, model.geometry) for treatment in treatments())
    return next((plan for plan in found if plan is not None), Plan(stacks=model.geometry.stacks))


def check_plan(plan: Plan, model: Model) -> None:
    """Raise PlanError if the model cannot run the plan."""
    for treatment in used_in(plan):
        treatment.check(plan, model.geometry)


def treated_by(plan: Plan, model: Model) -> tuple[Treated, ...]:
    """What each treatment says of the plan, those included that it does not use."""
    used = plan.treatments
    return tuple(
        replace(treatment.treated(plan, model.geometry), used=treatment.name in used) for treatment in treatments()
    )
