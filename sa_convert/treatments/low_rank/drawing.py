"""How the figure of a plan shows low-rank keys."""

from collections.abc import Mapping
from dataclasses import replace

from sa_convert.domain.geometry import ModelGeometry
from sa_convert.domain.plan import Arguments
from sa_convert.domain.treated import Drawing, Look

LOOK = Look("low rank", "#4fc3a1", "keys cached in fewer numbers", mark="floor")


def drawing(groups: Mapping[int, Mapping[int, Arguments]], geometry: ModelGeometry) -> Drawing:
    """groups: arguments by layer and KV group."""
    looks = {
        (layer, group): replace(LOOK, label=f"r{arguments['keys']}")
        for layer, told in groups.items()
        for group, arguments in told.items()
    }
    return Drawing(
        title=f"Low-rank keys: {len(looks)} of {geometry.total_groups} KV groups",
        note="Number after an r: how many numbers are cached of a key",
        looks=looks,
        legend=(LOOK.state,),
    )
