"""What the KV groups of a layer compute and cache under a plan: the answers of all its treatments together."""

from collections.abc import Iterable

from sa_convert.domain.answers import Answers
from sa_convert.domain.geometry import LayerGeometry, ModelGeometry
from sa_convert.domain.plan import Plan
from sa_convert.treatments.registry import treatments


def layer_answers(plan: Plan, geometry: ModelGeometry, index: int) -> tuple[Answers, ...]:
    """The answers of each KV group of a layer."""
    layer = geometry.layers[index]
    planned = plan.layers.get(index, {})
    found = []
    for group in range(layer.groups):
        heads = tuple(layer.heads_of(group))
        answers = Answers(heads=heads, scores=heads, keys=layer.head_dim, values=layer.values, reach=layer.window)
        for treatment in treatments():
            if planned == treatment.name:
                answers = treatment.answers(answers, layer, None)
            elif not isinstance(planned, str) and treatment.name in planned.get(group, {}):
                answers = treatment.answers(answers, layer, planned[group][treatment.name])
        found.append(answers)
    return tuple(found)


def own_heads(plan: Plan, geometry: ModelGeometry, index: int) -> tuple[int, ...]:
    """The query heads of a layer that compute scores of their own."""
    return tuple(head for answers in layer_answers(plan, geometry, index) for head in answers.scores)


def groups_without_keys(plan: Plan, geometry: ModelGeometry) -> int:
    """KV groups that cache no key under a plan."""
    found = (layer_answers(plan, geometry, index) for index in plan.layers)
    return sum(answers.keys == 0 for layer in found for answers in layer)


def own_groups(layer: LayerGeometry, heads: Iterable[int]) -> tuple[int, ...]:
    """The KV groups whose key these query heads read."""
    return tuple(sorted({layer.group_of(head) for head in heads}))
