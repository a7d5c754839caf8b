"""The plan of a conversion: everything that is decided and checked before the first byte is written."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sa_convert.domain.change import Savings
from sa_convert.domain.checkpoint import TensorEdit
from sa_convert.domain.geometry import ModelGeometry
from sa_convert.domain.model import Model
from sa_convert.domain.plan import Plan, plain
from sa_convert.domain.stacks import layer_of, parse_label
from sa_convert.domain.stock import StockForm
from sa_convert.domain.treated import Treated
from sa_convert.errors import PlanError, RecipeError
from sa_convert.plan.engine_blocks import norm_edits
from sa_convert.plan.engines import stock_form
from sa_convert.plan.savings import plan_savings, used_at
from sa_convert.treatments.registry import lenders, named, treatments, used_in
from sa_convert.treatments.tensor_edits import plan_edits

if TYPE_CHECKING:
    from sa_convert.domain.recipe import Recipe


@dataclass(frozen=True)
class ConversionPlan:
    """A model, the plan for it, what happens to each tensor, and what that saves.

    used_at: tokens of a sequence that the result is for. stock: how it is written for an engine that runs a class of
    its own; None: for the code that it carries.
    """

    model: Model
    plan: Plan
    edits: Mapping[str, TensorEdit]
    savings: Savings
    used_at: int
    stock: StockForm | None = None

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
            f"{recipe.origin.at('sharing')}: no head borrows from another, so there is nothing to convert; "
            "name at least one source."
        )
    return conversion_of(model, plan, recipe)


def conversion_of(model: Model, plan: Plan, recipe: "Recipe") -> ConversionPlan:
    """What a plan that was checked does to a model. recipe: says what for. Raises PlanError if the engine that it names
    cannot run the plan."""
    stock = stock_form(model, plan, recipe)
    edits = plan_edits(model, plan)
    if stock is not None and stock.has_code:
        edits |= norm_edits(model, plan, stock)
    at = used_at(model, recipe.at)
    return ConversionPlan(model, plan, edits, plan_savings(model, plan, edits, at), at, stock)


def planned(recipe: "Recipe", model: Model) -> Plan:
    """The plan that a recipe spells out. Raises RecipeError, naming the line, and PlanError."""
    if recipe.plan is not None:
        return _explicit(recipe, model.geometry)
    found = (treatment.from_recipe(recipe, model.geometry) for treatment in treatments())
    return next((plan for plan in found if plan is not None), Plan(stacks=model.geometry.stacks))


def _explicit(recipe: "Recipe", geometry: ModelGeometry) -> Plan:
    """Raises RecipeError, naming the line, if the plan names a layer that the model does not have."""
    assert recipe.plan is not None
    for label in recipe.plan:
        where = recipe.origin.at("plan", label)
        stack, number = parse_label(label)
        depth = dict(geometry.stacks or (("", len(geometry.layers)),)).get(stack)
        if depth is None:
            names = ", ".join(name for name, _ in geometry.stacks)
            hint = f"this model has the stacks {names}" if names else "this model has plain numbers"
            raise RecipeError(f"{where}: there is no layer '{label}'; {hint}")
        if number >= depth:
            raise RecipeError(f"{where}: there is no layer '{label}'; the model has layers 0 to {depth - 1}")
    return Plan.from_json(
        {label: _by_group(told, label, geometry) for label, told in recipe.plan.items()}, geometry.stacks
    )


def _by_group(planned: Any, label: int | str, geometry: ModelGeometry) -> Any:
    """What a recipe says of a layer, spelled out for each KV group if it names a treatment of all of them alike."""
    name, arguments = planned, None
    if not isinstance(planned, str):
        name, arguments = next(iter(planned.items()))
    treatment = named(name) if isinstance(name, str) else None
    if treatment is None or treatment.for_all is None:
        return planned
    told = plain(treatment.for_all if arguments is None else arguments)
    groups = geometry.layers[layer_of(geometry.stacks, *parse_label(label))].groups
    return {group: {name: told} for group in range(groups)} or name


def resolved_recipe(recipe: "Recipe", plan: Plan, geometry: ModelGeometry) -> "Recipe":
    """The same recipe with its plan spelled out: run again, it gives the same folder."""
    used = used_in(plan)
    told = used[0].to_recipe(plan, geometry) if len(used) == 1 else None
    if told is None:
        told = {"plan": {int(key) if key.isdigit() else key: _short(groups) for key, groups in plan.to_json().items()}}
    return recipe.resolved(told)


def layers_in_recipe(plan: Plan, geometry: ModelGeometry) -> dict[str, Any]:
    """The layers of a plan as the treatment's own grammar has them, or as in config.json."""
    used = used_in(plan)
    told = used[0].layers_in_recipe(plan, geometry) if len(used) == 1 else None
    return plan.to_json() if told is None else told


def _short(planned: Any) -> Any:
    """What a plan tells of a layer, in JSON, as a recipe has it: the other way round than `_by_group`."""
    if isinstance(planned, str):
        return planned
    first = next(iter(planned.values()))
    treatment = named(next(iter(first)))
    if treatment is None or treatment.for_all is None:
        return {int(group): told for group, told in planned.items()}
    return treatment.name if first[treatment.name] == plain(treatment.for_all) else first


def check_plan(plan: Plan, model: Model) -> None:
    """Raise PlanError if the model cannot run the plan."""
    for index in plan.layers:
        _check_layer(plan, model.geometry, index)
    for treatment in used_in(plan):
        treatment.check(plan, model.geometry)
    for borrower, (lender, head) in lenders(plan, model.geometry):
        group = model.geometry.layers[lender].group_of(head)
        planned = plan.layers.get(lender, {})
        for name in [planned] if isinstance(planned, str) else planned.get(group, {}):
            if not _lends(name):
                raise PlanError(
                    f"Layer {plan.label(lender)} KV group {group} lends its scores to layer {plan.label(borrower)}, so "
                    f"it cannot be treated by {name}."
                )


def _check_layer(plan: Plan, geometry: ModelGeometry, index: int) -> None:
    """That there is such a layer, and that it has such KV groups."""
    depth, planned = len(geometry.layers), plan.layers[index]
    if not 0 <= index < depth:
        raise PlanError(f"The plan has a layer {index}, but the model has layers 0 to {depth - 1}.")
    layer, name = geometry.layers[index], plan.label(index)
    if not layer.heads:
        raise PlanError(f"Layer {name} has no softmax attention, so nothing can be done to it.")
    if isinstance(planned, str):
        treatment = named(planned)
        if treatment is None or not treatment.whole_layers:
            raise PlanError(f"Layer {name}: {planned} is not done to whole layers; name its KV groups.")
        return
    for group in planned:
        if not 0 <= group < layer.groups:
            raise PlanError(f"Layer {name} has KV groups 0 to {layer.groups - 1}, but the plan names {group}.")


def _lends(name: str) -> bool:
    treatment = named(name)
    return treatment is not None and treatment.lends


def treated_by(plan: Plan, model: Model) -> tuple[Treated, ...]:
    """What each treatment says of the plan, those included that it does not use."""
    found = []
    for treatment in treatments():
        numbers = {"groups": plan.group_count(treatment.name), "layers": len(plan.layers_of(treatment.name))}
        counts = {what: number for what, number in numbers.items() if number}
        found.append(replace(treatment.treated(plan, model.geometry), counts=counts, used=bool(counts)))
    return tuple(found)
