"""`sa-convert inspect`: what a model is, and what of it can be shared."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from sa_convert.commands.options import echo_json, json_option, model_argument
from sa_convert.units import human_bytes, human_count

if TYPE_CHECKING:
    from sa_convert.data.geometry import LayerGeometry
    from sa_convert.plan.inspection import Inspection, Kind

_LONGEST_PERIOD = 16


@click.command()
@model_argument
@json_option
def command(model: str, as_json: bool) -> None:
    """Show a model's layers, heads and sizes, and what can be shared.

    Reads config.json and the headers of the weights only. A .gguf file is shown as it will be once dequantised.
    """
    from sa_convert.plan.inspection import inspect_checkpoint
    from sa_convert.read.model import open_model

    inspection = inspect_checkpoint(open_model(model))
    if as_json:
        echo_json(inspection.to_json())
        return
    rows = list(_rows(inspection))
    width = max(len(label) for label, _ in rows) + 2
    for label, text in rows:
        click.echo(f"{label:<{width}}{text}")


def _rows(inspection: "Inspection") -> Iterator[tuple[str, str]]:
    """Label and text of every line."""
    geometry = inspection.geometry
    yield "Model", inspection.model + (f" at {inspection.revision}" if inspection.revision else "")
    yield "Type", inspection.model_type
    yield "Family", inspection.family or "none that can be converted"
    yield "Layers", _or_unknown(inspection.layers)
    yield "Query heads", _or_unknown(inspection.query_heads, "{} per layer")
    total = f", {geometry.total_groups:,} in all" if geometry else ""
    yield "KV groups", _or_unknown(inspection.kv_groups, "{} per layer") + total
    yield "Head size", _or_unknown(inspection.head_dim)
    if geometry:
        yield "Attention", _attention(geometry.layers)
    shards = "1 file" if inspection.shards == 1 else f"{inspection.shards} shards"
    yield "Tensors", f"{inspection.tensors:,} in {shards}"
    yield "Parameters", _with_exact(human_count(inspection.parameters), inspection.parameters)
    dequantised = ", once dequantised" if inspection.model.lower().endswith(".gguf") else ""
    yield "Data types", ", ".join(_dtypes(inspection)) + dequantised
    yield "Size", _with_exact(human_bytes(inspection.checkpoint_bytes), inspection.checkpoint_bytes, " bytes")
    cache = inspection.cache_bytes_per_token
    yield "Cache per token", "unknown" if cache is None else f"{cache:,} bytes in the data type of the weights"
    if inspection.shared and geometry:
        layers = format_layers(tuple(inspection.shared.layers))
        reused = inspection.shared.reused_groups(geometry)
        yield "Shares already", f"{reused} of {geometry.total_groups} KV groups, in layers {layers}"
    yield from _sharing(inspection)


def _sharing(inspection: "Inspection") -> Iterator[tuple[str, str]]:
    geometry = inspection.geometry
    if inspection.reason or geometry is None:
        yield "Can share", f"no: {inspection.reason}"
        return
    yield "Can share", "yes, by " + ("query head" if geometry.granularity == "head" else "whole layers only")
    for kind in inspection.kinds:
        name = _kind(geometry.layers[kind.layers[0]])
        yield "", f"{name}: {_reach(kind)}"
    groups, total = inspection.shareable_groups, geometry.total_groups
    yield "At most", f"{groups} of {total} KV groups can lose their keys ({groups / total:.1%})"


def _reach(kind: "Kind") -> str:
    """Which layers of a kind can reuse which."""
    first = f"layer {kind.layers[0]} cannot, no earlier layer is of its kind"
    if not kind.reusing:
        return first
    plural = "layer" if len(kind.reusing) == 1 else "layers"
    return f"{plural} {format_layers(kind.reusing)} can reuse earlier ones of this kind; {first}"


def _attention(layers: "Sequence[LayerGeometry]") -> str:
    """Such as "0-4 sliding(512), 5 full", and how often that repeats."""
    names = [_kind(layer) for layer in layers]
    if len(set(names)) == 1:
        return f"{names[0]}, all layers"
    for period in range(2, min(_LONGEST_PERIOD, len(names) // 2) + 1):
        if all(name == names[index % period] for index, name in enumerate(names)):
            return f"{_runs(names[:period])}, and so on every {period} layers"
    return _runs(names)


def _runs(names: Sequence[str]) -> str:
    runs: list[tuple[int, int, str]] = []
    for index, name in enumerate(names):
        if runs and runs[-1][2] == name:
            runs[-1] = (runs[-1][0], index, name)
        else:
            runs.append((index, index, name))
    return ", ".join(f"{first} {name}" if first == last else f"{first}-{last} {name}" for first, last, name in runs)


def _kind(layer: "LayerGeometry") -> str:
    """Such as "full" or "sliding(512)"."""
    name = layer.attention.removesuffix("_attention")
    window = f"({layer.window})" if layer.window else ""
    return name + window + ("" if layer.rotary else " without rotary")


def format_layers(layers: Sequence[int]) -> str:
    """Such as "1-29", "2, 4-6" or "3-41 (every 2nd)"."""
    step = layers[1] - layers[0] if len(layers) > 1 else 1
    if step > 1 and len(layers) > 3 and list(layers) == list(range(layers[0], layers[-1] + 1, step)):
        return f"{layers[0]}-{layers[-1]} (every {step}{ {2: 'nd', 3: 'rd'}.get(step, 'th') })"
    spans: list[list[int]] = []
    for layer in layers:
        if spans and spans[-1][-1] == layer - 1:
            spans[-1] = [spans[-1][0], layer]
        else:
            spans.append([layer])
    return ", ".join("-".join(map(str, span)) for span in spans)


def _dtypes(inspection: "Inspection") -> Iterator[str]:
    for dtype, elements in inspection.dtypes.items():
        share = f" ({elements / inspection.parameters:.1%})" if len(inspection.dtypes) > 1 else ""
        yield dtype + share


def _with_exact(human: str, exact: int, unit: str = "") -> str:
    return f"{human} ({exact:,}{unit})" if exact >= 1000 else f"{human}"


def _or_unknown(value: int | None, text: str = "{}") -> str:
    return "unknown" if value is None else text.format(value)
