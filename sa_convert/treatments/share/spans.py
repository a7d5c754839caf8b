"""Spans, the paper's form of sharing, resolved to a sharing map of a particular model."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from sa_convert.domain.geometry import LayerGeometry, ModelGeometry
from sa_convert.domain.layer_range import LayerRange
from sa_convert.domain.recipe_map import HeadSource
from sa_convert.domain.stacks import parse_label, stack_ranges
from sa_convert.errors import PlanError, RecipeError
from sa_convert.treatments.share.rules import layer_difference
from sa_convert.treatments.share.sharing_map import SharingMap

if TYPE_CHECKING:
    from sa_convert.domain.recipe import Origin, Recipe, Span


def sharing_of(recipe: "Recipe", geometry: ModelGeometry) -> SharingMap:
    """The sharing map of a recipe with spans or map. `rules.check_map` tells whether the model can run it.

    Raises RecipeError, naming the line, if a span does not fit the model.
    """
    assert recipe.sharing is not None
    if recipe.sharing.spans is not None:
        return resolve_spans(recipe.sharing.spans, geometry, recipe.origin)
    if recipe.sharing.map is not None:
        return _explicit(recipe, recipe.sharing.map, geometry)
    raise RecipeError(f"{recipe.origin.at('sharing', 'search')}: a search has no map before it has run")


def _explicit(
    recipe: "Recipe", rows: Mapping[int | str, tuple[HeadSource | None, ...]], geometry: ModelGeometry
) -> SharingMap:
    """Raises RecipeError, naming the line, if the map names a stack that the model does not have."""
    names = [name for name, _ in geometry.stacks]
    for layer in rows:
        stack, number = parse_label(layer)
        if stack not in (names or [""]):
            hint = "this model has one kind of attention, and plain numbers: write {}"
            if names:
                hint = f"this model has the stacks {', '.join(names)}: write {names[-1]}.{{}}, say"
            where = recipe.origin.at("sharing", "map", layer)
            raise RecipeError(f"{where}: there is no layer '{layer}'; {hint.format(number)}")
        depth = dict(geometry.stacks).get(stack, len(geometry.layers))
        if number >= depth:
            raise PlanError(f"Layer {layer} borrows attention, but the model has layers 0 to {depth - 1}.")
    return SharingMap.from_json(rows, geometry.stacks)


def resolve_spans(spans: "Sequence[Span]", geometry: ModelGeometry, origin: "Origin | None" = None) -> SharingMap:
    """Every head i of a span's layers borrows from head i of the span's source, in each stack of the model.

    Without a source, each layer borrows from the nearest earlier layer outside of the span that has its kind of
    attention (type, window, heads, head size, rotation). If all layers are alike, that is the layer before the span.
    If a source borrows from another layer itself, the map names the one that owns the attention. Layers without softmax
    attention are passed over.
    origin: where the spans were written, for messages. Raises RecipeError for a span outside of the model, spans that
    overlap, and a layer without any possible source.
    """
    sources: dict[int, int] = {}
    for stack, layers in stack_ranges(geometry.stacks, len(geometry.layers)):
        if geometry.stacks and len(layers) == 1:
            continue  # a single layer has none before it, whatever the other stacks can share
        found = _sources(spans, geometry, layers, f"{stack}." if stack else "", origin)
        sources |= {layers[layer]: layers[source] for layer, source in found.items()}
    for layer in sorted(sources):
        sources[layer] = sources.get(sources[layer], sources[layer])
    return SharingMap(
        {
            layer: tuple((source, head) for head in range(geometry.layers[layer].heads))
            for layer, source in sources.items()
        },
        geometry.stacks,
    )


def _sources(
    spans: "Sequence[Span]", geometry: ModelGeometry, members: range, stack: str, origin: "Origin | None"
) -> dict[int, int]:
    """The source of each layer of one stack, by the numbers in it. members: its layers in the model's numbering. stack:
    what comes before the numbers in messages."""
    kinds, depth = [geometry.layers[layer] for layer in members], len(members)
    sources: dict[int, int] = {}
    for number, span in enumerate(spans):
        where = f"{origin.at('sharing', 'spans', number)}: " if origin else ""
        layers = layer_range(span.layers, depth)
        if layers[-1] >= depth:
            raise RecipeError(
                f"{where}span {span.layers} is outside of the model, which has {depth} layers "
                f"({stack}0 to {stack}{depth - 1})"
                + ("; spans are of all stacks alike: write fractions of the depth, or a map" if stack else "")
            )
        if span.source is not None and span.source >= layers[0]:
            raise RecipeError(
                f"{where}source {span.source} is not before span {span.layers}, which is {_name(layers, stack)} in "
                "this model"
            )
        for layer in (layer for layer in layers if kinds[layer].heads):
            if layer in sources:
                raise RecipeError(f"{where}span {span.layers} overlaps with another span at layer {stack}{layer}")
            sources[layer] = _nearest(layer, layers, kinds, where, stack) if span.source is None else span.source
        if not any(kinds[layer].heads for layer in layers):
            raise RecipeError(f"{where}no layer of span {span.layers} has softmax attention; name others")
    return sources


def layer_range(layers: LayerRange, depth: int) -> range:
    """The layers that a range names in a model of `depth` layers.

    A fraction f of the depth is layer f * depth, rounded to the nearest (halves up), and at most the last: 84%-94% of
    32 layers are 27 to 30.
    """
    if not layers.by_depth:
        return range(int(layers.first), int(layers.last) + 1)
    first, last = (min(int(end * depth + Fraction(1, 2)), depth - 1) for end in (layers.first, layers.last))
    return range(first, last + 1)


def _nearest(layer: int, span: range, kinds: "Sequence[LayerGeometry]", where: str, stack: str) -> int:
    for source in range(span[0] - 1, -1, -1):
        if _alike(kinds[source], kinds[layer]):
            return source
    kind = kinds[layer]
    window = f" with a window of {kind.window} tokens" if kind.window else ""
    reason = (
        f"none before {_name(span, stack)} is of its kind ({kind.attention}{window})" if span[0] else "it is the first"
    )
    raise RecipeError(
        f"{where}layer {stack}{layer} has no source: {reason}; start the span later, or leave that layer out"
    )


def _alike(source: LayerGeometry, borrower: LayerGeometry) -> bool:
    return layer_difference(source, borrower) is None and source.heads == borrower.heads


def _name(layers: range, stack: str) -> str:
    first = f"{stack}{layers[0]}"
    return f"layer {first}" if len(layers) == 1 else f"layers {first}-{layers[-1]}"
