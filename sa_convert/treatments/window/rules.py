"""Which layers' KV groups can have a window."""

from sa_convert.domain.geometry import LayerGeometry


def refusal(layer: LayerGeometry) -> str | None:
    """Why a layer's KV groups cannot have a window, or None if they can."""
    if not layer.heads:
        return "it has no softmax attention"
    if not layer.cached:
        return "it caches nothing"
    if layer.stack.endswith("cross"):
        return "it attends to what an encoder has read, which has no most recent token"
    return None
