"""Where a model wants its input."""

from typing import Any

import torch


def input_device(model: Any) -> torch.device:
    """Where a model wants its tokens: where its embedding is. Hooks of accelerate move them on if it is offloaded."""
    device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device
