"""What a checkpoint is: its family and its geometry."""

from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.domain.model import Model
from sa_convert.read.family_of import family_of
from sa_convert.read.geometry_of import geometry_of


def model_of(checkpoint: Checkpoint) -> Model:
    """From config.json and headers alone. Raises UnsupportedModelError or CheckpointError."""
    family = family_of(checkpoint.config, checkpoint.tensors)
    return Model(checkpoint=checkpoint, family=family, geometry=geometry_of(checkpoint, family))
