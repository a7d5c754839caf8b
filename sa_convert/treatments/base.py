"""What a treatment is: everything that the other rooms ask of one. Every default means "as in the base".

A treatment is a folder of these files, of which only the first and the runtime are needed:

    treatment.py   the class below: its name, its rules, what it changes of a KV group's answers
    runtime.py     the code that travels with a model that is treated so
    edits.py       which tensors it changes, and how
    cost.py        what it would cost, from an observed base model
    trying.py      what to change of a base model that runs, to try it before anything is written
    drawing.py     how it is told and drawn: report, card, figure, `inspect`

and one line in registry.py. Nothing here imports torch.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_convert.domain.answers import Answers
from sa_convert.domain.checkpoint import TensorEdit
from sa_convert.domain.fitted import Fitted
from sa_convert.domain.geometry import Head, LayerGeometry, ModelGeometry
from sa_convert.domain.plan import Arguments, Plan
from sa_convert.domain.treated import Drawing, Inspected, Treated
from sa_convert.domain.units import Unit, Units
from sa_convert.errors import SaConvertError
from sa_convert.models.processes import count

if TYPE_CHECKING:
    from sa_convert.domain.calibrated import Measure
    from sa_convert.domain.model import Model
    from sa_convert.domain.recipe import Recipe
    from sa_convert.treatments.ledger import Ledger, Observed
    from sa_convert.treatments.trial import Trial


class Treatment:
    """Something that can be done to a KV group, or to a whole layer, so that it costs less."""

    name: str
    """In recipes, config.json and reports: "share"."""

    file: str
    """Set to `__file__` by each treatment: beside it lies runtime.py."""

    whole_layers = False
    """Whether a plan may name it for a whole layer, without arguments."""

    for_all: Arguments = None
    """If it is done to all KV groups of a layer alike: the arguments of each, unless a plan gives others. A recipe may
    then name it, with or without arguments, for the layer as a whole."""

    lends = False
    """Whether other heads may use the scores of a KV group that is treated so."""

    keeps_shapes = False
    """Whether all tensors of a treated layer have the shapes that they have in the base."""

    fits = False
    """Whether some of its tensors are fitted on calibration text."""

    @property
    def runtime_file(self) -> Path:
        """The code that travels with a model that is treated so, as shared_attention_NAME.py."""
        return Path(self.file).with_name("runtime.py")

    refits = False
    """Whether a fit of the output projections may repair what it costs."""

    # Rules.

    def parse(self, arguments: Any) -> Arguments:
        """Arguments of one KV group as a recipe has them, checked as far as that goes without a model.

        Raises RecipeValueError, whose path leads to the item that is to blame.
        """
        return arguments

    def check(self, plan: Plan, geometry: ModelGeometry) -> None:
        """Raise PlanError if the model cannot run this treatment's part of the plan."""

    def from_recipe(self, recipe: "Recipe", geometry: ModelGeometry) -> Plan | None:
        """The plan of a recipe in a grammar of the treatment's own, or None if the recipe has none of it."""
        return None

    def to_recipe(self, plan: Plan, geometry: ModelGeometry) -> dict[str, Any] | None:
        """Keys of a recipe that give this plan, in the treatment's own grammar; None: it has none, and `plan:` does.

        plan: of this treatment alone.
        """
        return None

    def layers_in_recipe(self, plan: Plan, geometry: ModelGeometry) -> dict[str, Any] | None:
        """The layers of such a plan in that grammar, as JSON; None: it has none."""
        return None

    # What it changes.

    def answers(self, before: Answers, layer: LayerGeometry, arguments: Arguments) -> Answers:
        """What a treated KV group computes and caches. before: without this treatment. arguments: None if the layer is
        treated as a whole."""
        return before

    def edits(self, model: "Model", plan: Plan) -> Mapping[str, TensorEdit]:
        """What happens to tensors, besides the queries and keys of heads without scores, which go anyway."""
        return {}

    def learner(self, units: Units) -> "Callable[[Observed], None] | None":
        """What is shown the layers of the unchanged model over some sequences, before costs, trials and `fit`, which
        then use what was learned; None: nothing has to be."""
        return None

    def join(self) -> None:
        """After the last sequence: put together what several processes have shown a part of each to `learner`, with
        `sa_convert.models.processes`."""
        if count() > 1 and type(self).learner is not Treatment.learner:
            raise SaConvertError(f"'{self.name}' cannot be learned by several processes: use one.")

    def prepare(self, session: Any, plan: Plan | None) -> None:
        """Likewise, with passes over the calibration sequences of its own, of which several processes may do a part
        each. session: a `sa_convert.observe.session.Session`. plan: the one that is known to be wanted; None: a search
        will find it."""

    def fit(self, session: Any, plan: Plan) -> Fitted:
        """The tensors that are fitted, of a treatment that `fits`. session: a `sa_convert.observe.session.Session`."""
        return Fitted()

    def keeps_outputs(self, plan: Plan) -> bool:
        """Whether the output projections of its part of the plan read as many numbers as in the base."""
        return self.keeps_shapes

    # How it is searched for.

    impossible = "No KV group of this model can be treated so."
    """What is said to whom a search is refused, if there are no candidates."""

    def candidates(self, units: Units) -> Collection[Unit]:
        """The units to which a search could do it at the most."""
        return units.all

    def trial(self, plan: Plan) -> "Trial":
        """What to change of a base model that runs, to try the plan before anything is written."""
        from sa_convert.treatments.trial import Trial

        return Trial()

    def ledger(self, units: Units, plan: Plan, measure: "Measure", known: "Ledger | None" = None) -> "Ledger":
        """An empty ledger of what this treatment costs each unit under a plan. known: the one that was filled without a
        plan. The default offers nothing."""
        from sa_convert.treatments.ledger import Ledger

        return Ledger(units, self.name, measure, without_plan=not plan)

    def lenders(self, plan: Plan, geometry: ModelGeometry) -> Iterator[tuple[int, Head]]:
        """For each query head that uses the scores of another one: its layer, and that other one."""
        return iter(())

    # How it is told.

    def treated(self, plan: Plan, geometry: ModelGeometry) -> Treated:
        """What the plan does by this treatment."""
        groups, layers = plan.group_count(self.name), len(plan.layers_of(self.name))
        parts = [f"{groups} of {geometry.total_groups} KV groups"] if groups else []
        parts += [f"{layers} whole {'layer' if layers == 1 else 'layers'}"] if layers else []
        summary = " and ".join(parts) or "nothing"
        return Treated(
            name=self.name,
            label=self.name.capitalize(),
            summary=summary,
            rows=((self.name, summary),),
            lead=f"{summary} are treated by `{self.name}`",
            heading=f"What is treated by {self.name}",
            table=("| layer | KV groups |", "|---|---|", *_lines(plan, self.name)),
        )

    def drawing(self, plan: Plan, geometry: ModelGeometry) -> Drawing | None:
        """What the figure of a plan shows of this treatment; None: nothing."""
        return None

    def inspected(self, geometry: ModelGeometry | None, plan: Plan | None, reason: str | None) -> Inspected:
        """What `inspect` tells. geometry: None for a model that cannot be converted. plan: of a converted model.
        reason: why the model cannot be converted, or None."""
        groups = plan.group_count(self.name) if plan else 0
        if not groups or geometry is None:
            return Inspected(reason)
        return Inspected(reason, rows=((f"Treated by {self.name}", f"{groups} of {geometry.total_groups} KV groups"),))


def _lines(plan: Plan, name: str) -> list[str]:
    lines = [
        f"| {plan.label(layer)} | {', '.join(map(str, groups))} |" for layer, groups in plan.groups_of(name).items()
    ]
    return lines + [f"| {plan.label(layer)} | all |" for layer in plan.layers_of(name)]
