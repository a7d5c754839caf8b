"""What a model is and what of it can be shared, from config.json and headers alone."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.domain.geometry import ModelGeometry
from sa_convert.domain.sharing_map import SharingMap
from sa_convert.domain.stacks import place_of
from sa_convert.errors import UnsupportedModelError
from sa_convert.families.family import PREFIX
from sa_convert.plan.converted import converted_parts
from sa_convert.read.family_of import family_of
from sa_convert.read.geometry_of import geometry_of
from sa_convert.treatments.share.rules import layer_difference
from sa_convert.treatments.share.savings import cache_bytes

FIRST_OF_ITS_KIND = "no earlier layer of its kind"


@dataclass(frozen=True)
class Kind:
    """Layers whose attention means the same, so that each can reuse the earlier ones.

    reusing: layers that can reuse. groups: their KV groups, which is what sharing could remove at most.
    """

    stack: str
    attention: str
    window: int | None
    rotary: bool
    layers: tuple[int, ...]
    reusing: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class Inspection:
    """What `sa-convert inspect` tells. Whatever could not be known is None.

    reason: why nothing can be shared, or None. geometry: None for models that cannot be converted; layers, heads and
    groups are then what config.json says. layers: of all stacks together. query_heads, kv_groups, head_dim: of the
    first layer with softmax attention. dtypes: elements by dtype. checkpoint_bytes: of the tensors.
    cache_bytes_per_token: one sequence, in the dtype of the weights; with cross-attention, of a token that is read and
    one that is written; 0 for a model that caches nothing. shared: the map of a model that shares already.
    """

    model: str
    revision: str | None
    model_type: str
    family: str | None
    reason: str | None
    layers: int | None
    query_heads: int | None
    kv_groups: int | None
    head_dim: int | None
    geometry: ModelGeometry | None
    kinds: tuple[Kind, ...]
    shared: SharingMap | None
    tensors: int
    shards: int
    parameters: int
    dtypes: Mapping[str, int]
    checkpoint_bytes: int
    cache_bytes_per_token: int | None

    @property
    def total_groups(self) -> int | None:
        return self.geometry.total_groups if self.geometry else None

    @property
    def shareable_groups(self) -> int:
        """KV groups that sharing could remove at most."""
        return 0 if self.reason else sum(kind.groups for kind in self.kinds)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        content = {key: value for key, value in vars(self).items() if key not in ("geometry", "kinds", "shared")}
        geometry = self.geometry
        first = sorted(kind.layers[0] for kind in self.kinds)
        attention = geometry and [
            {"layer": geometry.label(at), **asdict(layer)} for at, layer in enumerate(geometry.layers)
        ]
        return content | {
            "dtypes": dict(self.dtypes),
            "granularity": geometry.granularity if geometry else None,
            "stacks": dict(geometry.stacks) if geometry else {},
            "attention": attention,
            "sharing": {
                "possible": self.reason is None,
                "reason": self.reason,
                "total_groups": self.total_groups,
                "shareable_groups": self.shareable_groups,
                "kinds": [self._kind_json(kind) for kind in self.kinds],
                "layers_without_source": {geometry.label(at): FIRST_OF_ITS_KIND for at in first} if geometry else {},
                "reused_groups": self.shared.reused_groups(geometry) if self.shared and geometry else 0,
                "layers": self.shared.to_json() if self.shared else {},
            },
        }

    def _kind_json(self, kind: Kind) -> dict[str, Any]:
        """Layers by their numbers in the stack."""
        stacks = self.geometry.stacks if self.geometry else ()
        numbers = {key: [place_of(stacks, layer)[1] for layer in getattr(kind, key)] for key in ("layers", "reusing")}
        return {**asdict(kind), **numbers}


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Everything that config.json and the headers tell; a model that cannot be converted is still described.

    Raises CheckpointError where the files contradict each other.
    """
    config, tensors = checkpoint.config, checkpoint.tensors
    family = geometry = reason = shared = cache = None
    try:
        if str(config.get("model_type")).startswith(PREFIX) and isinstance(config.get("shared_attention"), Mapping):
            family, geometry, shared = converted_parts(checkpoint)
            cache = cache_bytes(checkpoint, family, geometry, shared)
            reason = "The model shares attention already; convert its base model with another recipe."
        else:
            family = family_of(config, tensors)
            geometry = geometry_of(checkpoint, family)
            cache = cache_bytes(checkpoint, family, geometry, SharingMap())
    except UnsupportedModelError as error:
        reason = str(error)
    kinds = _kinds(geometry) if geometry else ()
    if reason is None and not any(kind.reusing for kind in kinds):
        reason = "Every layer is the only one of its kind, so none has an earlier layer to reuse."
    dtypes: dict[str, int] = {}
    for tensor in tensors.values():
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.elements
    first = next(layer for layer in geometry.layers if layer.heads) if geometry else None
    return Inspection(
        model=checkpoint.identity,
        revision=checkpoint.revision,
        model_type=str(config.get("model_type")),
        family=family.model_type if family else None,
        reason=reason,
        layers=len(geometry.layers) if geometry else _told(config, "num_hidden_layers", "n_layer", "num_layers"),
        query_heads=first.heads if first else _told(config, "num_attention_heads", "n_head", "num_heads"),
        kv_groups=first.groups if first else _told(config, "num_key_value_heads", "num_kv_heads"),
        head_dim=first.head_dim if first else _told(config, "head_dim"),
        geometry=geometry,
        kinds=kinds,
        shared=shared,
        tensors=len(tensors),
        shards=len(checkpoint.shards),
        parameters=sum(dtypes.values()),
        dtypes=dict(sorted(dtypes.items(), key=lambda item: -item[1])),
        checkpoint_bytes=sum(tensor.bytes for tensor in tensors.values()),
        cache_bytes_per_token=cache,
    )


def _kinds(geometry: ModelGeometry) -> tuple[Kind, ...]:
    """The classes of layers that the rules of sharing allow to share, by their first layers."""
    classes: list[list[int]] = []
    for index, layer in enumerate(geometry.layers):
        if not layer.heads:
            continue
        home = next((c for c in classes if layer_difference(geometry.layers[c[0]], layer) is None), None)
        if home is None:
            classes.append([index])
        else:
            home.append(index)
    kinds = []
    for members in classes:
        first = geometry.layers[members[0]]
        groups = sum(geometry.layers[index].groups for index in members[1:])
        reusing = tuple(members[1:])
        kinds.append(Kind(first.stack, first.attention, first.window, first.rotary, tuple(members), reusing, groups))
    return tuple(kinds)


def _told(config: Mapping[str, Any], *keys: str) -> int | None:
    """What config.json says under the first of these keys that it has, also for the text part of a multimodal model."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        for key in keys:
            if isinstance(place.get(key), int):
                return int(place[key])
    return None
