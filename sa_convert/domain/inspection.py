"""What `inspect` finds out about a model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sa_convert.domain.geometry import ModelGeometry
from sa_convert.domain.treated import Inspected


@dataclass(frozen=True)
class Inspection:
    """What `sa-convert inspect` tells. Whatever could not be known is None.

    reason: why no treatment can be done to it, or None. geometry: None for models that cannot be converted; layers,
    heads and groups are then what config.json says. layers: of all stacks together. query_heads, kv_groups, head_dim:
    of the first layer with softmax attention. dtypes: elements by dtype. checkpoint_bytes: of the tensors.
    cache_bytes_per_token: one sequence, in the dtype of the weights; with cross-attention, of a token that is read and
    one that is written; 0 for a model that caches nothing. cache_bytes: of one sequence, by its tokens; of a converted
    model what it caches now. treatments: what each treatment says.
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
    treatments: tuple[Inspected, ...]
    tensors: int
    shards: int
    parameters: int
    dtypes: Mapping[str, int]
    checkpoint_bytes: int
    cache_bytes_per_token: int | None
    cache_bytes: Mapping[int, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        content = {key: value for key, value in vars(self).items() if key not in ("geometry", "treatments")}
        geometry, caches = self.geometry, self.cache_bytes
        attention = geometry and [
            {"layer": geometry.label(at), **asdict(layer)} for at, layer in enumerate(geometry.layers)
        ]
        return content | {
            "dtypes": dict(self.dtypes),
            "cache_bytes": {str(tokens): size for tokens, size in caches.items()} if caches else None,
            "granularity": geometry.granularity if geometry else None,
            "stacks": dict(geometry.stacks) if geometry else {},
            "attention": attention,
            **{key: value for inspected in self.treatments for key, value in inspected.section.items()},
        }
