"""The shape of a model's attention, from config.json and the headers of its tensors."""

from collections.abc import Mapping
from typing import Any

from sa_convert.data.checkpoint import Checkpoint, TensorEntry
from sa_convert.data.geometry import LayerGeometry, ModelGeometry
from sa_convert.errors import CheckpointError, UnsupportedModelError
from sa_convert.export.shared_attention_families import Family

_FLOATS = ("F64", "F32", "F16", "BF16")
FULL, SLIDING = "full_attention", "sliding_attention"


def number(config: Mapping[str, Any], key: str) -> int:
    """A positive whole number of config.json; raises CheckpointError naming the key."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: '{key}' should be a positive whole number, but is {value!r}.")
    return value


def layers_prefix(checkpoint: Checkpoint, family: Family) -> str:
    """How tensor names of the layers begin: "model.layers", or "layers" where the base prefix was not saved."""
    tensors = checkpoint.tensors
    candidates = [family.layers, family.layers.partition(".")[2]]
    for prefix in candidates:
        if f"{prefix}.0.{family.attention}.{family.query}.weight" in tensors:
            return prefix
    raise CheckpointError(
        f"The checkpoint has no tensor '{candidates[0]}.0.{family.attention}.{family.query}.weight', which a model of "
        f"type '{family.model_type}' needs; the weights do not belong to this config.json."
    )


def attention_prefix(checkpoint: Checkpoint, family: Family, layer: int) -> str:
    """How tensor names of one layer's attention begin, with the closing dot."""
    return f"{layers_prefix(checkpoint, family)}.{layer}.{family.attention}."


def geometry_of(checkpoint: Checkpoint, family: Family) -> ModelGeometry:
    """Heads, groups, attention types and windows of every layer.

    Raises CheckpointError where tensors are missing or contradict config.json, UnsupportedModelError where the
    projections are quantised.
    """
    config, tensors = checkpoint.config, checkpoint.tensors
    heads = number(config, "num_attention_heads")
    depth = number(config, "num_hidden_layers")
    kinds = attention_kinds(config, family, depth)
    prefix = layers_prefix(checkpoint, family)
    layers = []
    for index, (attention, window, rotary) in enumerate(kinds):
        start = f"{prefix}.{index}.{family.attention}."
        rows = {}
        for module in (family.query, family.key, family.value):
            _refuse_quantised(tensors, start, module)
            tensor = tensors.get(f"{start}{module}.weight")
            if tensor is None:
                raise CheckpointError(
                    f"The checkpoint has no tensor '{start}{module}.weight', though config.json counts {depth} layers."
                )
            rows[module] = _rows(tensor)
        query, key = f"{start}{family.query}.weight", f"{start}{family.key}.weight"
        if rows[family.query] % heads:
            raise CheckpointError(
                f"'{query}' has {rows[family.query]} rows; num_attention_heads in config.json is {heads}, no divisor."
            )
        head_dim = rows[family.query] // heads
        if config.get("head_dim") not in (None, head_dim):
            raise CheckpointError(
                f"config.json: 'head_dim' is {config['head_dim']}, but '{query}' has {head_dim} rows a head."
            )
        groups = rows[family.key] // head_dim
        if not groups or rows[family.key] % head_dim or heads % groups:
            raise CheckpointError(
                f"'{key}' has {rows[family.key]} rows; they do not fit {heads} query heads of {head_dim}."
            )
        if config.get("num_key_value_heads") not in (None, groups):
            raise CheckpointError(
                f"config.json: 'num_key_value_heads' is {config['num_key_value_heads']}, but '{key}' holds {groups}."
            )
        layers.append(LayerGeometry(heads, groups, head_dim, attention, window, rotary))
    return ModelGeometry(tuple(layers), family.granularity)


def _rows(tensor: TensorEntry) -> int:
    if len(tensor.shape) != 2 or tensor.dtype not in _FLOATS:
        raise UnsupportedModelError(
            f"'{tensor.name}' is {tensor.dtype} of shape {list(tensor.shape)}, not a plain matrix of floats: "
            "quantised projections cannot be taken apart; convert the unquantised model."
        )
    return tensor.shape[0]


def _refuse_quantised(tensors: Mapping[str, TensorEntry], start: str, module: str) -> None:
    if f"{start}{module}.weight" in tensors:
        extra = ("weight_scale", "weight_scale_inv", "input_scale", "qweight", "weight.absmax", "SCB")
        found = next((f"{start}{module}.{name}" for name in extra if f"{start}{module}.{name}" in tensors), None)
    else:
        found = next(
            (name for name in tensors if name.startswith(f"{start}{module}.") and not name.endswith("bias")), None
        )
    if found is not None:
        raise UnsupportedModelError(
            f"'{found}' belongs to a quantised projection, which cannot be taken apart; convert the unquantised model."
        )


def attention_kinds(config: Mapping[str, Any], family: Family, depth: int) -> list[tuple[str, int | None, bool]]:
    """Per layer its attention type, window and whether it rotates queries and keys, as the family's config has it."""
    window = config.get("sliding_window", family.window)
    if config.get("use_sliding_window", family.uses_window) is False:
        window = None
    rotates = [family.rotary != "none"] * depth
    if family.rotary == "no_rope_layers":
        interval = config.get("no_rope_layer_interval", 4)
        rotates = [bool(flag) for flag in config.get("no_rope_layers") or ((i + 1) % interval for i in range(depth))]
    types = config.get("layer_types") or _default_types(config, family, depth, window, rotates)
    if len(types) != depth or len(rotates) != depth:
        raise CheckpointError(f"config.json: 'layer_types' or 'no_rope_layers' does not list all {depth} layers.")
    if family.rotary == "sliding" and window is not None:
        rotates = [kind == SLIDING for kind in types]
    return [(kind, window if kind == SLIDING else None, rotated) for kind, rotated in zip(types, rotates, strict=True)]


def _default_types(
    config: Mapping[str, Any], family: Family, depth: int, window: int | None, rotates: list[bool]
) -> list[str]:
    """The attention types of a config that does not list them; `Family.sliding` names the rule."""
    if window is None and family.sliding != "periodic":
        return [FULL] * depth
    first_full = config.get("max_window_layers", 28)
    period = config.get(family.period_key, family.period) if family.period_key else family.period
    if isinstance(period, str):  # "LLLG": local layers, then a global one
        period = len(period)
    rules = {
        "none": lambda layer: False,
        "all": lambda layer: True,
        "periodic": lambda layer: (layer + 1) % period != 0,
        "from_max_window_layers": lambda layer: layer >= first_full,
        "alternate_below_max_window_layers": lambda layer: layer % 2 == 0 and layer < first_full,
        "without_rotary": lambda layer: not rotates[layer],
    }
    return [SLIDING if rules[family.sliding](layer) else FULL for layer in range(depth)]
