"""How an inspection is shown in a terminal."""

from collections.abc import Callable, Iterator, Sequence

from sa_convert.console.amounts import human_bytes, human_count
from sa_convert.console.printable import one_line
from sa_convert.domain.geometry import LayerGeometry, ModelGeometry
from sa_convert.domain.inspection import Inspection
from sa_convert.domain.stacks import layer_names, stack_ranges
from sa_convert.present.terminal.aligned import aligned

_LONGEST_PERIOD = 16


def render_inspection(inspection: Inspection) -> str:
    """An aligned table, without a final newline."""
    return aligned((label, one_line(text)) for label, text in _rows(inspection))


def _rows(inspection: Inspection) -> Iterator[tuple[str, str]]:
    """Label and text of every line."""
    geometry = inspection.geometry
    yield "Model", inspection.model + (f" at {inspection.revision}" if inspection.revision else "")
    yield "Type", inspection.model_type
    yield "Family", inspection.family or "none that can be converted"
    if geometry:
        yield from _shape(geometry)
    else:
        yield "Layers", _or_unknown(inspection.layers)
        yield "Query heads", _or_unknown(inspection.query_heads, "{} per layer")
        yield "KV groups", _or_unknown(inspection.kv_groups, "{} per layer")
        yield "Head size", _or_unknown(inspection.head_dim)
    shards = "1 file" if inspection.shards == 1 else f"{inspection.shards} shards"
    yield "Tensors", f"{inspection.tensors:,} in {shards}"
    yield "Parameters", _with_exact(human_count(inspection.parameters), inspection.parameters)
    dequantised = ", once dequantised" if inspection.model.lower().endswith(".gguf") else ""
    yield "Data types", ", ".join(_dtypes(inspection)) + dequantised
    yield "Size", _with_exact(human_bytes(inspection.checkpoint_bytes), inspection.checkpoint_bytes, " bytes")
    yield "Cache per token", _cache(inspection)
    if inspection.cache_bytes:
        shown = [f"{human_bytes(size)} of {tokens:,}" for tokens, size in inspection.cache_bytes.items()]
        yield "Cache", ", ".join([f"{shown[0]} tokens", *shown[1:]])
    for told in inspection.treatments:
        yield from told.rows


def _shape(geometry: ModelGeometry) -> Iterator[tuple[str, str]]:
    """Layers, heads and groups, stack by stack if there are several."""
    stacks = stack_ranges(geometry.stacks, len(geometry.layers))
    by_stack = [[geometry.layers[index] for index in members] for _, members in stacks]

    def each(value: Callable[[LayerGeometry], int]) -> str:
        """Such as "8", "4-8" (if layers differ), or "16 encoder, 8 decoder"."""
        ranges = [sorted({value(layer) for layer in layers if layer.heads}) for layers in by_stack]
        texts = [f"{sizes[0]}-{sizes[-1]}" if len(sizes) > 1 else str(sizes[0]) for sizes in ranges]
        if len(set(texts)) == 1:
            return texts[0]
        return ", ".join(f"{text} {name}" for text, (name, _) in zip(texts, stacks, strict=True))

    if geometry.stacks:
        yield "Layers", ", ".join(f"{len(members)} {name}" for name, members in stacks)
    else:
        attending = [index for index, layer in enumerate(geometry.layers) if layer.heads]
        some = f" (softmax attention in {layer_names((), attending)})"
        yield "Layers", str(len(geometry.layers)) + (some if len(attending) < len(geometry.layers) else "")
    yield "Query heads", f"{each(lambda layer: layer.heads)} per layer"
    yield "KV groups", f"{each(lambda layer: layer.groups)} per layer, {geometry.total_groups:,} in all"
    yield "Head size", each(lambda layer: layer.head_dim)
    for (name, _), layers in zip(stacks, by_stack, strict=True):
        yield "Attention" if layers is by_stack[0] else "", (f"{name}: " if name else "") + _attention(layers)


def _cache(inspection: Inspection) -> str:
    geometry, cache = inspection.geometry, inspection.cache_bytes_per_token
    if cache is None:
        return "unknown"
    if not cache:
        return "none: an encoder caches nothing; sharing saves parameters and compute"
    pair = ", of one token read and one written" if geometry and len(geometry.stacks) > 1 else ""
    return f"{cache:,} bytes in the data type of the weights{pair}"


def _attention(layers: Sequence[LayerGeometry]) -> str:
    """Such as "0-4 sliding(512), 5 full", and how often that repeats."""
    names = [layer.kind for layer in layers]
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


def _dtypes(inspection: Inspection) -> Iterator[str]:
    for dtype, elements in inspection.dtypes.items():
        share = f" ({elements / inspection.parameters:.1%})" if len(inspection.dtypes) > 1 else ""
        yield dtype + share


def _with_exact(human: str, exact: int, unit: str = "") -> str:
    return f"{human} ({exact:,}{unit})" if exact >= 1000 else f"{human}"


def _or_unknown(value: int | None, text: str = "{}") -> str:
    return "unknown" if value is None else text.format(value)
