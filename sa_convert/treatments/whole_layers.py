"""What treatments of whole layers have in common: rules, tensors, and how they are told.

The attention of such a layer is gone, with all its tensors and its cache entries. The norm before it stays: in many
families the rest of the layer reads it, too.
"""

from collections.abc import Iterable
from dataclasses import replace

from sa_convert.domain.answers import Answers
from sa_convert.domain.checkpoint import TensorEdit
from sa_convert.domain.geometry import LayerGeometry, ModelGeometry
from sa_convert.domain.model import Model
from sa_convert.domain.plan import Arguments, Plan
from sa_convert.domain.stacks import layer_names
from sa_convert.domain.treated import Drawing, Inspected, Look, Treated
from sa_convert.domain.units import Unit, Units
from sa_convert.errors import PlanError
from sa_convert.read.names import attention_prefix
from sa_convert.treatments.base import Treatment

KEPT = ("relative_attention_bias.",)
"""Tensors of a layer's attention that other layers use: T5's first layer has the positions of all."""


class WholeLayerTreatment(Treatment):
    """Something that takes the place of a layer's attention."""

    whole_layers = True
    impossible = "No layer of this model caches anything, so none would save any cache by losing its attention."

    look: Look
    """Of the layer's KV groups in the figure."""
    done: str
    """What is said to have been done to layers: "have no attention"."""

    def parse(self, arguments: object) -> Arguments:
        from sa_convert.domain.recipe_map import RecipeValueError

        raise RecipeValueError(f"{self.name} is done to whole layers: write it in the place of the layer's KV groups")

    def check(self, plan: Plan, geometry: ModelGeometry) -> None:
        gone = {index for index, told in plan.layers.items() if isinstance(told, str)}
        for index in plan.layers_of(self.name):
            stack = geometry.layers[index].stack
            if all(at in gone for at, layer in enumerate(geometry.layers) if layer.heads and layer.stack == stack):
                raise PlanError(
                    f"Layer {plan.label(index)}: {self.name} would leave no layer with attention"
                    f"{f' in {stack}' if stack else ''}; leave one as it is."
                )

    def answers(self, before: Answers, layer: LayerGeometry, arguments: Arguments) -> Answers:
        return replace(before, heads=(), scores=(), keys=0, values=0)

    def edits(self, model: Model, plan: Plan) -> dict[str, TensorEdit]:
        if model.family.modules.output_outside and plan.layers_of(self.name):
            raise PlanError(
                f"Layer {plan.label(plan.layers_of(self.name)[0])}: in models of type '{model.family.model_type}' the "
                f"output projection lies outside of the attention, so {self.name} cannot take the place of both."
            )
        return {
            name: TensorEdit(rows=()) for index in plan.layers_of(self.name) for name in attention_tensors(model, index)
        }

    def candidates(self, units: Units) -> list[Unit]:
        return [unit for unit in units.all if units.geometry.layers[unit.layer].cached]

    def treated(self, plan: Plan, geometry: ModelGeometry) -> Treated:
        layers = plan.layers_of(self.name)
        names, total = layer_names(plan.stacks, layers), sum(bool(layer.heads) for layer in geometry.layers)
        done = self.done.replace("have", "has", 1) if len(layers) == 1 else self.done
        count = f"{len(layers)} of {total} layers {done}"
        return Treated(
            name=self.name,
            label=self.name.capitalize(),
            summary=f"{count}: {names or 'none'}",
            rows=((f"layers that {self.done}", names or "none"),),
            lead=count,
            heading=f"Layers that {self.done}",
            caption=f"Which layers {self.done}",
            table=("| layers | instead of attention |", "|---|---|", f"| {names or 'none'} | {self.look.meaning} |"),
        )

    def drawing(self, plan: Plan, geometry: ModelGeometry) -> Drawing:
        layers = plan.layers_of(self.name)
        looks = {(index, group): self.look for index in layers for group in range(geometry.layers[index].groups)}
        plural = "layer" if len(layers) == 1 else "layers"
        title = f"{len(layers)} {plural} of {len(geometry.layers)}: {self.look.meaning}"
        return Drawing(title=title, note="", looks=looks, legend=(self.look.state,))

    def inspected(self, geometry: ModelGeometry | None, plan: Plan | None, reason: str | None) -> Inspected:
        layers = plan.layers_of(self.name) if plan else ()
        if not layers or geometry is None:
            return Inspected(reason)
        return Inspected(reason, rows=((f"Layers that {self.done}", layer_names(geometry.stacks, layers)),))


def attention_tensors(model: Model, layer: int) -> Iterable[str]:
    """The names of all tensors of a layer's attention that nothing else uses."""
    prefix = attention_prefix(model, layer)
    names = (name for name in model.checkpoint.tensors if name.startswith(prefix))
    return [name for name in names if not name.removeprefix(prefix).startswith(KEPT)]
