"""Which layers may have low-rank keys."""

from sa_convert.domain.geometry import ModelGeometry


def refusal(geometry: ModelGeometry, index: int) -> str | None:
    """Why a layer's KV groups cannot have low-rank keys, or None if they can."""
    layer = geometry.layers[index]
    if not layer.heads:
        return "it has no softmax attention"
    if not layer.cached:
        return "it caches nothing"
    if layer.stack.endswith("cross"):
        return "it attends to what an encoder has read, whose keys are cached as they are"
    return geometry.turning if layer.rotary else None
