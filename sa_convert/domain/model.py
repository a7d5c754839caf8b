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


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How models are run."""

    device: str = "auto"
    """Such as "cpu" or "cuda:1"; "auto": the best that there is."""

    dtype: str = "auto"
    """Of the computation, and of the weights that a .gguf file is dequantised to; "auto": as stored, and float32."""

    layer_by_layer: bool = False
    """Keep one layer's weights in memory at a time, even if all of them would fit."""

    trust: bool = False
    """Code that a model brings along may run; see `sa_convert.read.remote_code`."""

    @property
    def stored_dtype(self) -> str:
        """Of the weights that a .gguf file is dequantised to."""
        return "float32" if self.dtype == "auto" else self.dtype
