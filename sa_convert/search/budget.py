"""How much of the key cache a model can save at all, and a clear word if more is asked."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sa_convert.domain.units import Units
from sa_convert.errors import RecipeError
from sa_convert.treatments.base import Treatment

if TYPE_CHECKING:
    from sa_convert.domain.recipe import Origin, Search


def check_budget(units: Units, treatments: Sequence[Treatment], search: "Search", origin: "Origin") -> None:
    """Raises RecipeError, before anything is run, if the model cannot save so much."""
    most = most_removable(units, treatments)
    if most == 0:
        raise RecipeError(" ".join(treatment.impossible for treatment in treatments))
    if search.key_cache is not None and search.key_cache > most + 1e-9:
        raise too_much(search.key_cache, most, origin)


def most_removable(units: Units, treatments: Sequence[Treatment]) -> float:
    """The part of the key cache that these treatments can save at the most."""
    return units.removed_keys({unit for treatment in treatments for unit in treatment.candidates(units)})


def too_much(asked: float, most: float, origin: "Origin") -> RecipeError:
    return RecipeError(
        f"{origin.at('sharing', 'search', 'key_cache')}: {asked * 100:.4g}% of the key cache is more than sharing can "
        f"save of this model, which is {most:.1%} at the most: write {math.floor(most * 100)}% or less."
    )
