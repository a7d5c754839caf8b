"""The shape of a model's attention, from config.json and the headers of its tensors."""

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

from sa_convert.domain.checkpoint import FLOATS, Checkpoint, TensorEntry
from sa_convert.domain.geometry import LayerGeometry, ModelGeometry
from sa_convert.errors import CheckpointError, UnsupportedModelError
from sa_convert.families.family import Family, Stack, Windows
from sa_convert.read.expected import expected_shard
from sa_convert.read.foreign_weights import part_of_quantised, quantised, refuse_foreign_weights
from sa_convert.read.names import attention_config, attention_start, has_stack, projection

DEPTHS = ("num_hidden_layers", "num_layers")
"""Config keys of the number of layers that stand in if a family's own key is missing."""

HIDDEN, SIZES = ("hidden_size", "d_model", "n_embd"), ("head_dim", "d_kv")
"""Config keys of the numbers of a state, and of a head."""

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


def number(config: Mapping[str, Any], key: str, *others: str, least: int = 1) -> int:
    """A whole number of config.json, under the first of these keys that it has; raises CheckpointError."""
    key = next((name for name in (key, *others) if name in config), key)
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        wanted = "a positive whole number" if least else "a whole number from 0"
        raise CheckpointError(f"config.json: '{key}' should be {wanted}, but is {value!r}.")
    return value


def geometry_of(checkpoint: Checkpoint, family: Family, reusing: Container[str] = ()) -> ModelGeometry:
    """Heads, groups, attention types and windows of every layer.

    reusing: labels of layers whose tensors have other shapes than in the base, in a converted model; they are as the
    first layer of their stack that is as it was, or as config.json says if there is none. Raises CheckpointError if
    tensors are missing or contradict config.json, UnsupportedModelError if the projections are quantised, and as
    `refuse_foreign_weights`.
    """
    refuse_foreign_weights(checkpoint)
    config = attention_config(checkpoint.config, family)
    layers: list[LayerGeometry] = []
    for stack in family.all_stacks:
        if family.encoder_decoder and not has_stack(checkpoint, family, stack):
            continue  # an encoder saved alone
        depth, cached = _depth(checkpoint, config, stack), caches(config, family, stack)
        lost = [f"{stack.name}.{index}".removeprefix(".") in reusing for index in range(depth)]
        found = [
            None if lost[index] else _layer(checkpoint, config, family, stack, index, depth) for index in range(depth)
        ]
        whole = next((layer for layer in found if layer), None)
        if all(lost):
            whole = replace(told_layer(config, family, stack), stored=_usual_dtype(checkpoint))
        if whole is None:
            raise _missing(checkpoint, family, stack, 0, depth)
        for at, (kind, window, rotary) in enumerate(attention_kinds(config, family, depth)):
            layer = whole if lost[at] else found[at]
            if layer is None:
                layers.append(LayerGeometry(0, 0, 0, "none", stack=stack.name))
                continue
            layers.append(replace(layer, attention=kind, window=window, rotary=rotary, stack=stack.name, cached=cached))
    return ModelGeometry(
        tuple(layers),
        family.granularity,
        turning=turning_problem(config, family),
        weighing=weighing_problem(config, family),
        merging=merging_problem(config, family),
    )


def turning_problem(config: Mapping[str, Any], family: Family) -> str | None:
    """Why keys cannot be cached before they are turned by position, or None if they can."""
    if family.turning is not None:
        return family.turning
    found = [config.get(key) for key in ("rope_parameters", "rope_scaling")]
    for told in [each for each in found if isinstance(each, Mapping)]:
        for each in (told, *(inner for inner in told.values() if isinstance(inner, Mapping))):
            if each.get("rope_type", each.get("type")) in ("dynamic", "longrope"):
                return "how much its keys are turned changes as the text grows longer"
            if "mrope_section" in each:
                return "positions of its tokens have several parts"
    return None


def weighing_problem(config: Mapping[str, Any], family: Family) -> str | None:
    """Why values cannot have fewer numbers, or None if nothing is done to them or to their sums before `output`."""
    modules = family.modules
    if modules.output_norm:
        return "what its heads put out is normalised before it is projected"
    if modules.gate:
        return "what its heads put out is scaled number by number before it is projected"
    if modules.value_limit and config.get(modules.value_limit) is not None:
        return "its values are clipped"
    if modules.output_outside:
        return "its output projection is no part of its attention"
    return None


def merging_problem(config: Mapping[str, Any], family: Family) -> str | None:
    """Why layers cannot have fewer KV groups, or None if projections alone make keys, which turn pair by pair, and
    values."""
    modules = family.modules
    if family.merging is not None:
        return family.merging
    if modules.fused or modules.transposed:
        return "its queries, keys and values come from one projection"
    if modules.query_norm or modules.key_norm:
        return "its queries or keys are normalised after their projections"
    if modules.plain_forward:
        return "the code of its family makes as many keys as config.json says"
    told = [config, *(config.get(key) for key in ("rope_parameters", "rope_scaling"))]
    for each in [each for each in told if isinstance(each, Mapping)]:
        if each.get("partial_rotary_factor", 1.0) not in (None, 1):
            return "only a part of each key turns by position"
    return weighing_problem(config, family)


def _depth(checkpoint: Checkpoint, config: Mapping[str, Any], stack: Stack) -> int:
    """Layers of a stack. Each has a tensor at least, so that a number out of all proportion is refused at once."""
    depth, tensors = number(config, stack.depth, *DEPTHS), len(checkpoint.tensors)
    if depth > tensors:
        raise CheckpointError(
            f"config.json counts {depth} layers, but the checkpoint has only {tensors} tensors; the weights do not "
            "belong to this config.json."
        )
    return depth


def caches(config: Mapping[str, Any], family: Family, stack: Stack) -> bool:
    """Whether keys and values are cached: by an encoder, only if it is set up as a decoder."""
    return stack.caches or (family.modules.bidirectional and bool(config.get("is_decoder")))


def _missing(checkpoint: Checkpoint, family: Family, stack: Stack, index: int, depth: int) -> CheckpointError:
    start = attention_start(checkpoint, family, stack, index)
    return CheckpointError(
        f"The checkpoint has no tensor '{start}{projection(family, 'query')}.weight', though config.json counts "
        f"{depth} layers."
    )


def _layer(
    checkpoint: Checkpoint, config: Mapping[str, Any], family: Family, stack: Stack, index: int, depth: int
) -> LayerGeometry | None:
    """Heads, groups and head size of a layer; None if it has no softmax attention, in a family of mixed layers."""
    tensors, start = checkpoint.tensors, attention_start(checkpoint, family, stack, index)
    heads = number(config, stack.heads, "num_attention_heads")
    if family.mixed and f"{start}{projection(family, 'query')}" not in checkpoint.modules:
        return None
    rows, modules = {}, family.modules
    for side in ("query", "key", "value"):
        module = projection(family, side)
        if (part := part_of_quantised(f"{start}{module}.", checkpoint)) is not None:
            raise quantised(checkpoint, part)
        tensor = tensors.get(f"{start}{module}.weight")
        if tensor is None:
            raise CheckpointError(
                f"The checkpoint has no tensor '{start}{module}.weight', though config.json counts {depth} layers."
            )
        rows[side] = _rows(tensor, axis=1 if modules.transposed else 0)
    if modules.fused:
        return _fused_layer(checkpoint, tensors[f"{start}{modules.fused}.weight"], config, family, heads, rows["query"])
    query, key = f"{start}{modules.query}.weight", f"{start}{modules.key}.weight"
    queries = rows["query"] // 2 if modules.gate == "query" else rows["query"]
    if not queries or queries % heads:
        raise CheckpointError(
            f"'{query}' has {rows['query']} rows; {stack.heads} in config.json is {heads}, no divisor."
        )
    head_dim = queries // heads
    if config.get("head_dim") not in (None, head_dim) and not _as_in_transformers(checkpoint, query, key):
        raise CheckpointError(
            f"config.json: 'head_dim' is {config['head_dim']}, but '{query}' has {head_dim} rows a head."
        )
    groups = rows["key"] // head_dim
    if not groups or rows["key"] % head_dim or heads % groups:
        raise CheckpointError(f"'{key}' has {rows['key']} rows; they do not fit {heads} query heads of {head_dim}.")
    if config.get(family.groups) not in (None, groups) and not _as_in_transformers(checkpoint, query, key):
        raise CheckpointError(f"config.json: '{family.groups}' is {config[family.groups]}, but '{key}' holds {groups}.")
    stored = tensors[f"{start}{projection(family, 'value')}.weight"].dtype
    value_dim = rows["value"] // groups
    return LayerGeometry(heads, groups, head_dim, value_dim=None if value_dim == head_dim else value_dim, stored=stored)


def told_layer(config: Mapping[str, Any], family: Family, stack: Stack) -> LayerGeometry:
    """A layer as config.json alone tells of it, if no layer of a converted model is as it was."""
    heads = number(config, stack.heads, "num_attention_heads")
    hidden = next((config[key] for key in HIDDEN if isinstance(config.get(key), int)), 0)
    head_dim = next((config[key] for key in SIZES if isinstance(config.get(key), int)), hidden // heads)
    groups = groups_in(config, family, heads)
    if head_dim < 1 or groups < 1 or heads % groups:
        raise CheckpointError("config.json does not tell how many heads there are, and of which size.")
    return LayerGeometry(heads, groups, head_dim)


def _usual_dtype(checkpoint: Checkpoint) -> str:
    """Of the tensors of floats, that of the most."""
    found = Counter(tensor.dtype for tensor in checkpoint.tensors.values() if tensor.dtype in FLOATS)
    return max(found, key=lambda dtype: found[dtype], default="F32")


def groups_in(config: Mapping[str, Any], family: Family, heads: int) -> int:
    """KV groups of layers with so many query heads, as far as config.json tells: as many, if it says nothing."""
    read = family.groups_if is None or bool(config.get(family.groups_if))
    if family.one_group and not (family.groups_if and read):
        return 1 if config.get(family.one_group, True) else heads
    return int(config.get(family.groups) or heads)


def _fused_layer(
    checkpoint: Checkpoint, tensor: TensorEntry, config: Mapping[str, Any], family: Family, heads: int, rows: int
) -> LayerGeometry:
    hidden = tensor.shape[0 if family.modules.transposed else 1]
    head_dim = number(config, "head_dim") if config.get("head_dim") else hidden // heads
    groups = _fused_groups(rows, heads, head_dim)
    if not groups and _as_in_transformers(checkpoint, tensor.name):
        head_dim = hidden // heads
        groups = _fused_groups(rows, heads, head_dim)
    if not groups:
        raise CheckpointError(
            f"'{tensor.name}' makes {rows} numbers, which are no queries, keys and values of {heads} heads of "
            f"{head_dim}; the weights do not belong to this config.json."
        )
    return LayerGeometry(heads, groups, head_dim, stored=tensor.dtype)


def _fused_groups(rows: int, heads: int, head_dim: int) -> int:
    """KV groups of a fused projection, or 0 if it does not consist of such heads."""
    groups = (rows // head_dim - heads) // 2 if head_dim else 0
    return groups if groups > 0 and (heads + 2 * groups) * head_dim == rows and heads % groups == 0 else 0


def _as_in_transformers(checkpoint: Checkpoint, *names: str) -> bool:
    """Whether transformers makes these tensors as large as they are. A key of config.json that says otherwise is then
    one that the family does not read, such as `num_key_value_heads` in a GPT-J. Loads transformers."""
    try:
        made = expected_shard(checkpoint.config, checkpoint.folder / "config.json").tensors
    except (CheckpointError, UnsupportedModelError):
        return False
    shapes = {tensor.name: tensor.shape for tensor in made}
    # The names of a model without a head lack the first part.
    found = [next((full for full in shapes if f".{full}".endswith(f".{name}")), None) for name in names]
    return all(full and shapes[full] == checkpoint.tensors[name].shape for full, name in zip(found, names, strict=True))


def _rows(tensor: TensorEntry, axis: int = 0) -> int:
    if len(tensor.shape) != 2 or tensor.dtype not in FLOATS:
        raise CheckpointError(
            f"'{tensor.name}' is {tensor.dtype} of shape {list(tensor.shape)}, not a matrix of floats; the weights do "
            "not belong to this config.json."
        )
    return tensor.shape[axis]


def attention_kinds(config: Mapping[str, Any], family: Family, depth: int) -> list[tuple[str, int | None, bool]]:
    """Per layer its attention type, window and whether it rotates queries and keys, as the family's config has it."""
    rotary, key = family.modules.rotary, family.windows.size_key
    window = config.get(key, family.windows.size)
    if config.get("use_sliding_window", family.windows.used) is False:
        window = None
    rotates = [rotary != "none" and not config.get("alibi")] * depth
    if rotary == "no_rope_layers":
        rotates = [bool(flag) for flag in _listed(config, "no_rope_layers", object) or _without_rotary(config, depth)]
    types = _listed(config, "layer_types", str) or _default_types(config, family.windows, depth, window, rotates)
    if len(types) != depth or len(rotates) != depth:
        raise CheckpointError(f"config.json: 'layer_types' or 'no_rope_layers' does not list all {depth} layers.")
    if rotary == "sliding" and window is not None:
        rotates = [kind == SLIDING for kind in types]
    if window is not None and SLIDING in types and key in config:
        window = number(config, key)
    return [(kind, window if kind == SLIDING else None, rotated) for kind, rotated in zip(types, rotates, strict=True)]


def _listed(config: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    """A list in config.json, empty if there is none. Raises CheckpointError unless its items are of this kind."""
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        items = "names" if kind is str else "values"
        raise CheckpointError(f"config.json: '{key}' should be a list of {items}, one for each layer; mend it.")
    return value


def _without_rotary(config: Mapping[str, Any], depth: int) -> list[bool]:
    """Every so many-th layer does not rotate queries and keys."""
    key = "no_rope_layer_interval"
    interval = number(config, key) if key in config else 4
    return [(layer + 1) % interval != 0 for layer in range(depth)]


def _default_types(
    config: Mapping[str, Any], windows: Windows, depth: int, window: int | None, rotates: list[bool]
) -> list[str]:
    """The attention types of a config that does not list them; `Windows.sliding` names the rule."""
    if windows.sliding == "chunked_with_rotary":
        return [CHUNKED if rotated else FULL for rotated in rotates]
    if window is None and not windows.sliding.startswith("periodic"):
        return [FULL] * depth
    first_full, period = 28, windows.period
    if "max_window_layers" in windows.sliding and "max_window_layers" in config:
        first_full = number(config, "max_window_layers", least=0)
    if windows.period_key is not None and windows.period_key in config:
        pattern = config[windows.period_key]  # or "LLLG": local layers, then a global one
        period = len(pattern) if isinstance(pattern, str) and pattern else number(config, windows.period_key)
    rules = {
        "none": lambda layer: False,
        "all": lambda layer: True,
        "periodic": lambda layer: (layer + 1) % period != 0,
        "periodic_first": lambda layer: layer % period != 0,
        "from_max_window_layers": lambda layer: layer >= first_full,
        "alternate_below_max_window_layers": lambda layer: layer % 2 == 0 and layer < first_full,
        "without_rotary": lambda layer: not rotates[layer],
    }
    return [SLIDING if rules[windows.sliding](layer) else FULL for layer in range(depth)]
