"""The error for activations that overflow or are not numbers."""

from typing import Any

from sa_convert.errors import CheckpointError


def not_finite(model: Any, where: str = "") -> CheckpointError:
    """where: such as " in layer 3"."""
    dtype = str(model.dtype).removeprefix("torch.")
    return CheckpointError(
        f"The model's activations{where} are not finite on the calibration text: its weights are damaged, or overflow "
        f"in {dtype}: get the model anew, or give a wider --dtype."
    )
