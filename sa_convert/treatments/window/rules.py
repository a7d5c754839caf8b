"""Which layers' KV groups can have a window, and which windows a search may choose."""

from dataclasses import dataclass

from sa_convert.domain.geometry import LayerGeometry


@dataclass(frozen=True)
class WindowLimits:
    """What a search may choose, if that is not what it usually tries. sinks: of every window. sizes: their lengths,
    ascending. whole_layers: all windows of a plan have one length, and only layers without a window of their own get
    one."""

    sinks: int | None = None
    sizes: tuple[int, ...] | None = None
    whole_layers: bool = False

    def refusal(self, layer: LayerGeometry) -> str | None:
        """As `refusal`, of these windows."""
        if self.whole_layers and layer.window is not None:
            return "it has a window already"
        return refusal(layer)


def refusal(layer: LayerGeometry) -> str | None:
    """Why a layer's KV groups cannot have a window, or None if they can."""
    if not layer.heads:
        return "it has no softmax attention"
    if not layer.cached:
        return "it caches nothing"
    if layer.stack.endswith("cross"):
        return "it attends to what an encoder has read, which has no most recent token"
    return None
