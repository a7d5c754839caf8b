"""A model that shares attention already: what its base was like, and what it shares."""

from collections.abc import Mapping
from typing import Any

from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.domain.geometry import ModelGeometry
from sa_convert.domain.sharing_map import SharingMap
from sa_convert.errors import CheckpointError, UnsupportedModelError
from sa_convert.read.geometry_of import geometry_of
from sa_convert.runtime.shared_attention_families import FAMILIES, PREFIX, Family
from sa_convert.treatments.share.rules import check_map


def converted_parts(checkpoint: Checkpoint) -> tuple[Family, ModelGeometry, SharingMap]:
    """Family, geometry of the base, and map of a converted model; the keys that it lost are not in its files.

    Raises UnsupportedModelError for an unknown base type, CheckpointError or SharingError for wrong files.
    """
    config = checkpoint.config
    base = str(config["model_type"]).removeprefix(PREFIX)
    family = FAMILIES.get(base)
    if family is None:
        raise UnsupportedModelError(
            f"The model has type '{config['model_type']}', whose base '{base}' this version does not know."
        )
    rows: Any = config["shared_attention"].get("layers")
    geometry = geometry_of(checkpoint, family, rows if isinstance(rows, Mapping) else ())
    try:
        shared = SharingMap.from_json(rows, geometry.stacks)
    except (AttributeError, TypeError, ValueError, IndexError):
        raise CheckpointError(
            "config.json: 'shared_attention' does not list sources for the heads of layers."
        ) from None
    check_map(shared, geometry)
    return family, geometry, shared
