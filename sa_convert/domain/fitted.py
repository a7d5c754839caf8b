"""Tensors that were fitted on calibration text for a treatment, on their way into the converted model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Fitted:
    """tensors: by name, in the dtype and shape in which they are written. after: for each that the base does not have,
    the tensor of the base that it follows in the files."""

    tensors: "Mapping[str, torch.Tensor]" = field(default_factory=dict)
    after: Mapping[str, str] = field(default_factory=dict)
