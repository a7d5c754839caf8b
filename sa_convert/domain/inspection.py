"""What `inspect` finds out about a model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sa_convert.domain.geometry import ModelGeometry
from sa_convert.domain.sharing_map import SharingMap
from sa_convert.domain.stacks import place_of

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
