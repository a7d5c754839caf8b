"""The rules of sharing: which map a model can run. One violation raises, naming the layer and the head, and why."""

from sa_convert.domain.geometry import LayerGeometry, ModelGeometry
from sa_convert.errors import PlanError
from sa_convert.treatments.share.sharing_map import SharingMap, Source


def check_map(sharing: SharingMap, geometry: ModelGeometry) -> None:
    """Raise PlanError if the map does not fit the model.

    Every source is an own head of an earlier layer with the same attention type, window, head size and treatment of
    positions; if queries are normalised over all heads together, only whole layers borrow.
    """
    depth = len(geometry.layers)
    for index, row in sharing.layers.items():
        if not 0 <= index < depth:
            raise PlanError(f"Layer {index} borrows attention, but the model has layers 0 to {depth - 1}.")
        layer, name = geometry.layers[index], geometry.label(index)
        if not layer.heads:
            raise PlanError(f"Layer {name} has no softmax attention, so it cannot borrow any.")
        if len(row) != layer.heads:
            raise PlanError(
                f"Layer {name} lists {len(row)} heads, but the model has {layer.heads} query heads in this layer."
            )
        if geometry.granularity == "layer" and None in row:
            raise PlanError(
                f"Layer {name} head {row.index(None)} keeps its own attention while others borrow; this model "
                "normalises the queries and keys of all heads together, so only whole layers can borrow."
            )
        for head, source in enumerate(row):
            if source is not None:
                reason = source_problem(sharing, geometry, index, source)
                if reason:
                    raise PlanError(
                        f"Layer {name} head {head} cannot borrow from layer {geometry.label(source[0])} "
                        f"head {source[1]}: {reason}."
                    )


def source_problem(sharing: SharingMap, geometry: ModelGeometry, index: int, source: Source) -> str | None:
    """Why a head of layer `index` cannot borrow from `source`, or None if it can."""
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
        return f"the source itself borrows from layer {geometry.label(at)} head {origin}; name that one"
    return None


def layer_difference(source: LayerGeometry, borrower: LayerGeometry) -> str | None:
    """Why probabilities of one layer mean nothing in the other, or None if they are of one kind."""
    if not source.heads or not borrower.heads:
        return f"the {'borrowing' if source.heads else 'source'} layer has no softmax attention"
    if source.stack != borrower.stack:
        return f"the source layer belongs to {source.stack}, the borrowing layer to {borrower.stack}"
    if source.attention != borrower.attention:
        return f"the source layer has {source.attention}, the borrowing layer {borrower.attention}"
    if source.window != borrower.window:
        return f"the source layer's window is {source.window} tokens, the borrowing layer's {borrower.window}"
    if source.head_dim != borrower.head_dim:
        return f"the source layer's heads have size {source.head_dim}, the borrowing layer's {borrower.head_dim}"
    if source.rotary != borrower.rotary:
        with_rotary, without = ("source", "borrowing") if source.rotary else ("borrowing", "source")
        return f"the {with_rotary} layer rotates queries and keys by position, the {without} layer does not"
    return None
