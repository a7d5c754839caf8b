"""How much of the key cache a model can save at all, and a clear word if more is asked."""

import math
from typing import TYPE_CHECKING

from sa_convert.domain.units import Units
from sa_convert.errors import RecipeError
from sa_convert.treatments.share.rules import layer_difference

if TYPE_CHECKING:
    from sa_convert.domain.recipe import Origin, Search


def check_budget(units: Units, search: "Search", origin: "Origin") -> None:
    """Raises RecipeError, before anything is run, if the model cannot save so much."""
    most = most_removable(units)
    if most == 0:
        raise RecipeError("No layer of this model can reuse the attention of an earlier one, so nothing can be shared.")
    if search.key_cache is not None and search.key_cache > most + 1e-9:
        raise too_much(search.key_cache, most, origin)


def most_removable(units: Units) -> float:
    """The part of the key cache that sharing can save at the most: all but the first layer of every kind, in which no
    head has a source."""
    layers = units.geometry.layers
    return units.removed_keys(
        unit
        for unit in units.all
        if any(layer_difference(layers[source], layers[unit.layer]) is None for source in range(unit.layer))
    )


def too_much(asked: float, most: float, origin: "Origin") -> RecipeError:
    return RecipeError(
        f"{origin.at('sharing', 'search', 'key_cache')}: {asked * 100:.4g}% of the key cache is more than sharing can "
        f"save of this model, which is {most:.1%} at the most: write {math.floor(most * 100)}% or less."
    )
