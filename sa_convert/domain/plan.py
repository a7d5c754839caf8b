"""The plan of a conversion: what is done to every KV group of a model, and to whole layers.

As in config.json (version 2), recipes and this class:

    layer 27   KV group 0   {share: [[26, 4], [22, 3], [21, 4]]}
               KV group 2   {low_rank: {keys: 32, values: 48}, share: ...}     treatments of one KV group combine
    layer 28   drop                                                            the layer as a whole
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from sa_convert.domain.stacks import Stacks, layer_label, layer_of, parse_label

Arguments = Any
"""What a treatment is told of one KV group: plain JSON, with tuples for lists. Each treatment says what its own are."""

GroupPlan = Mapping[str, Arguments]
"""Treatments of one KV group, and their arguments."""

LayerPlan = Mapping[int, GroupPlan] | str
"""By KV group, or the treatment of the whole layer."""


@dataclass(frozen=True)
class Plan:
    """For each treated layer, by KV group, {treatment: arguments}; or the name of a treatment of the whole layer.

    What is not listed stays as in the base. Layers are numbered through the model; stacks: those of the model, which
    name its layers (see `sa_convert.domain.stacks`). Numbers of layers in arguments count in the stack.
    """

    layers: Mapping[int, LayerPlan] = field(default_factory=dict)
    stacks: Stacks = ()

    def __post_init__(self) -> None:
        layers = {layer: _frozen_layer(self.layers[layer]) for layer in sorted(self.layers)}
        object.__setattr__(self, "layers", MappingProxyType({layer: plan for layer, plan in layers.items() if plan}))

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan, (_plain(self.layers), self.stacks)

    def __bool__(self) -> bool:
        return bool(self.layers)

    @classmethod
    def from_json(cls, layers: Mapping[Any, Any], stacks: Stacks = ()) -> "Plan":
        """From {"27": {"0": {"share": [[26, 4]]}}, "28": "drop"}, as in config.json and recipes.

        Raises ValueError for a stack that the model does not have, and for anything that is not such a mapping.
        """
        plans: dict[int, LayerPlan] = {}
        for label, plan in layers.items():
            if not isinstance(plan, str):
                plan = {int(group): _named(treatments) for group, treatments in _items(plan)}
            plans[layer_of(stacks, *parse_label(label))] = plan
        return cls(plans, stacks)

    def to_json(self) -> dict[str, Any]:
        """As in config.json: {"27": {"0": {"share": [[26, 4]]}}, "28": "drop"}."""
        return {self.label(layer): _plain(plan, texts=True) for layer, plan in self.layers.items()}

    def label(self, layer: int) -> str:
        """How people name a layer: "27", or "decoder.cross.3"."""
        return layer_label(self.stacks, layer)

    @property
    def treatments(self) -> tuple[str, ...]:
        """The names of those that are used, in alphabetical order."""
        names = {name for plan in self.layers.values() for name in _names(plan)}
        return tuple(sorted(names))

    def groups_of(self, treatment: str) -> dict[int, dict[int, Arguments]]:
        """Layer -> KV group -> arguments, of all KV groups that a treatment is done to."""
        labels = {}
        for layer, plan in self.layers.items():
            groups = {} if isinstance(plan, str) else plan
            told = {group: names[treatment] for group, names in groups.items() if treatment in names}
            if told:
                labels[layer] = told
        return labels

    def layers_of(self, treatment: str) -> tuple[int, ...]:
        """The layers that a treatment is done to as a whole."""
        return tuple(layer for layer, plan in self.layers.items() if plan == treatment)

    def group_count(self, treatment: str) -> int:
        """The number of KV groups that a treatment is done to, one by one."""
        return sum(map(len, self.groups_of(treatment).values()))

    def only(self, *treatments: str) -> "Plan":
        """The part of the plan that these treatments are."""
        kept: dict[int, LayerPlan] = {}
        for layer, plan in self.layers.items():
            if isinstance(plan, str):
                kept[layer] = plan if plan in treatments else {}
            else:
                kept[layer] = {
                    group: {name: told for name, told in names.items() if name in treatments}
                    for group, names in plan.items()
                }
        return Plan(kept, self.stacks)


def frozen(value: Any) -> Any:
    """Plain JSON that nobody can change: tuples for lists."""
    if isinstance(value, Mapping):
        return MappingProxyType({key: frozen(item) for key, item in value.items()})
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value


def plain(value: Any) -> Any:
    """As `json.loads` would have made it."""
    return _plain(value)


def _frozen_layer(plan: LayerPlan) -> LayerPlan:
    if isinstance(plan, str):
        return plan
    return MappingProxyType({group: frozen(plan[group]) for group in sorted(plan) if plan[group]})


def _plain(value: Any, texts: bool = False) -> Any:
    """texts: whether keys become texts, as JSON has them."""
    if isinstance(value, Mapping):
        return {str(key) if texts else key: _plain(item, texts) for key, item in value.items()}
    return [_plain(item, texts) for item in value] if isinstance(value, list | tuple) else value


def _items(plan: Any) -> Iterable[tuple[Any, Any]]:
    if not isinstance(plan, Mapping):
        raise ValueError(f"a layer is a mapping of KV groups or the name of a treatment, not {plan!r}")
    return plan.items()


def _named(treatments: Any) -> GroupPlan:
    if not isinstance(treatments, Mapping) or not all(isinstance(name, str) for name in treatments):
        raise ValueError(f"a KV group is a mapping of treatments, not {treatments!r}")
    return treatments


def _names(plan: LayerPlan) -> Iterable[str]:
    return (plan,) if isinstance(plan, str) else (name for names in plan.values() for name in names)
