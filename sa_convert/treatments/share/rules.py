"""The rules of sharing: which map a model can run. One violation raises, naming the layer and the head, and why."""

from sa_convert.domain.geometry import LayerGeometry, ModelGeometry
from sa_convert.domain.sharing_map import SharingMap, Source
from sa_convert.errors import PlanError


def check_map(sharing: SharingMap, geometry: ModelGeometry) -> None:
    """Raise PlanError where the map does not fit the model.

    Every source is an own head of an earlier layer with the same attention type, window, head size and treatment of
    positions; where queries are normalised over all heads together, only whole layers reuse.
    """
    depth = len(geometry.layers)
    for index, row in sharing.layers.items():
        if not 0 <= index < depth:
            raise PlanError(f"Layer {index} reuses attention, but the model has layers 0 to {depth - 1}.")
        layer, name = geometry.layers[index], geometry.label(index)
        if not layer.heads:
            raise PlanError(f"Layer {name} has no softmax attention, so it cannot reuse any.")
        if len(row) != layer.heads:
            raise PlanError(
                f"Layer {name} lists {len(row)} heads, but the model has {layer.heads} query heads in this layer."
            )
        if geometry.granularity == "layer" and None in row:
            raise PlanError(
                f"Layer {name} head {row.index(None)} keeps its own attention while others reuse; this model "
                "normalises the queries and keys of all heads together, so only whole layers can reuse."
            )
        for head, source in enumerate(row):
            if source is not None:
                reason = source_problem(sharing, geometry, index, source)
                if reason:
                    raise PlanError(
                        f"Layer {name} head {head} cannot reuse layer {geometry.label(source[0])} "
                        f"head {source[1]}: {reason}."
                    )


def source_problem(sharing: SharingMap, geometry: ModelGeometry, index: int, source: Source) -> str | None:
    """Why a head of layer `index` cannot reuse `source`, or None where it can."""
    layer, head = source
    if not 0 <= layer < len(geometry.layers):
        return f"the model has layers 0 to {len(geometry.layers) - 1}"
    if layer >= index:
        return "a source must be in an earlier layer"
    if geometry.layers[layer].heads and not 0 <= head < geometry.layers[layer].heads:
        return f"layer {geometry.label(layer)} has heads 0 to {geometry.layers[layer].heads - 1}"
    difference = layer_difference(geometry.layers[layer], geometry.layers[index])
    if difference:
        return difference
    row = sharing.layers.get(layer)
    if row is not None and head < len(row) and row[head] is not None:
        at, origin = row[head]  # type: ignore[misc]
        return f"the source itself reuses layer {geometry.label(at)} head {origin}; name that one"
    return None


def layer_difference(source: LayerGeometry, reuser: LayerGeometry) -> str | None:
    """Why attention weights of one layer mean nothing in the other, or None where they are of one kind."""
    if not source.heads or not reuser.heads:
        return f"the {'reusing' if source.heads else 'source'} layer has no softmax attention"
    if source.stack != reuser.stack:
        return f"the source layer belongs to {source.stack}, the reusing layer to {reuser.stack}"
    if source.attention != reuser.attention:
        return f"the source layer has {source.attention}, the reusing layer {reuser.attention}"
    if source.window != reuser.window:
        return f"the source layer's window is {source.window} tokens, the reusing layer's {reuser.window}"
    if source.head_dim != reuser.head_dim:
        return f"the source layer's heads have size {source.head_dim}, the reusing layer's {reuser.head_dim}"
    if source.rotary != reuser.rotary:
        with_rotary, without = ("source", "reusing") if source.rotary else ("reusing", "source")
        return f"the {with_rotary} layer rotates queries and keys by position, the {without} layer does not"
    return None
