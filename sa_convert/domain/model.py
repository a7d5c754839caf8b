"""A model as the converter knows it, and how one is run."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.domain.geometry import ModelGeometry

if TYPE_CHECKING:
    from sa_convert.families.family import Family


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint of which is known what it is."""

    checkpoint: Checkpoint
    """Configuration and headers; the weights lie in its folder."""

    family: "Family"
    """What is particular to models of its type."""

    geometry: ModelGeometry
    """Layers, query heads and KV groups; of a converted model those of its base."""
