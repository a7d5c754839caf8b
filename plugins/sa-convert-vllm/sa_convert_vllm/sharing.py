"""What a plan says of layers as a whole: which reuse another's attention, and which have none. Imports nothing."""


def gone_of(described: dict) -> set[int]:
    """Layers in whose place something else comes. described: `shared_attention` of a config.json, of version 2."""
    return {int(label) for label, layer in described["layers"].items() if isinstance(layer, str)}


def _shared(described: dict) -> dict[int, dict[int, list]]:
    """By layer and KV group, the source [layer, head] of each query head, or None."""
    found: dict[int, dict[int, list]] = {}
    for label, layer in described["layers"].items():
        for group, treated in {} if isinstance(layer, str) else layer.items():
            if "share" in treated:
                found.setdefault(int(label), {})[int(group)] = treated["share"]
    return found


def borrowed_of(described: dict, groups: int) -> dict[int, int]:
    """The source of each layer all of whose heads reuse the heads of the same numbers of one other layer. groups: KV
    groups of a layer."""
    found = {}
    for layer, shared in _shared(described).items():
        heads = [head for group in sorted(shared) for head in shared[group]]
        source = heads[0] and heads[0][0]
        if len(shared) == groups and heads == [[source, index] for index in range(len(heads))]:
            found[layer] = source
    return found


def narrow_of(described: dict, groups: int) -> dict[int, int]:
    """The width of the widest value in layers whose values are all of low rank."""
    found = {}
    for label, layer in described["layers"].items():
        told = (
            [] if isinstance(layer, str) else [treated.get("low_rank", {}).get("values") for treated in layer.values()]
        )
        if len(told) == groups and all(told):
            found[int(label)] = max(told)
    return found


def scattered(described: dict) -> int | None:
    """A layer whose query heads of one KV group read different keys, or None. vLLM's attention has one key for them."""
    for layer, groups in _shared(described).items():
        for group, heads in groups.items():
            size = len(heads)
            keys = {(layer, group) if head is None else (head[0], head[1] // size) for head in heads}
            if len(keys) > 1:
                return layer
    return None
