"""How much of the key cache a model can save at all, and a clear word if more is asked."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sa_convert.console.amounts import format_percent
from sa_convert.domain.units import Units
from sa_convert.errors import RecipeError
from sa_convert.treatments.base import Treatment

if TYPE_CHECKING:
    from sa_convert.domain.recipe import Origin, Search


def check_budget(units: Units, treatments: Sequence[Treatment], search: "Search", origin: "Origin") -> None:
    """As `check_removable`, of what a recipe asks for."""
    check_removable(units, treatments, search.key_cache, lambda asked, most: too_much(asked, most, origin))


def check_removable(
    units: Units, treatments: Sequence[Treatment], asked: float | None, refusal: Callable[[float, float], RecipeError]
) -> None:
    """Raises RecipeError, before anything is run, if the model cannot save the part of the key cache that is asked for.

    refusal: makes the error for what is asked and what is possible.
    """
    most = most_removable(units, treatments)
    if most == 0:
        raise RecipeError(" ".join(treatment.impossible for treatment in treatments))
    if asked is not None and asked > most + 1e-9:
        raise refusal(asked, most)


def most_removable(units: Units, treatments: Sequence[Treatment]) -> float:
    """The part of the key cache that these treatments can save at the most."""
    return units.removed_keys({unit for treatment in treatments for unit in treatment.candidates(units)})


def too_much(asked: float, most: float, origin: "Origin") -> RecipeError:
    return RecipeError(
        f"{origin.at('sharing', 'search', 'key_cache')}: {asked * 100:.4g}% of the key cache is more than sharing can "
        f"save of this model, which is {most:.1%} at the most: write {math.floor(most * 100)}% or less."
    )


def more_than_sharing(asked: float, most: float) -> RecipeError:
    """The same for the option of `analyze`."""
    return RecipeError(
        f"--key-cache {format_percent(asked)}: sharing can remove {most:.2%} of this model's key cache at the most; "
        f"ask for {int(most * 100)}% or less."
    )
