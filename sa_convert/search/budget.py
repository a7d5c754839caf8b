"""How much a model can save at all, and a clear word if more is asked."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sa_convert.console.amounts import format_percent
from sa_convert.domain.model import Model
from sa_convert.domain.units import Units
from sa_convert.errors import RecipeError
from sa_convert.models.placement import positions
from sa_convert.plan.engines import engine_of, own_window, searched_for
from sa_convert.treatments.base import Treatment
from sa_convert.treatments.registry import SEARCHED_FOR_CACHE, searched

if TYPE_CHECKING:
    from sa_convert.domain.recipe import CacheSearch, Origin, Recipe, Search


def treatments_of(recipe: "Recipe", model: Model) -> tuple[Treatment, ...]:
    """What the recipe's search may use."""
    return searched_for(model, recipe) or searched(recipe.treatments or (SEARCHED_FOR_CACHE if recipe.search else None))


def check_search(model: Model, recipe: "Recipe") -> None:
    """Raises RecipeError, before any weight is read, if headers tell that a recipe's search cannot reach its aim."""
    treatments = treatments_of(recipe, model)
    if recipe.search is not None:
        _check_own_windows(model, recipe, recipe.search)
        _check_cache(model, treatments, recipe.search, recipe.origin)
    elif recipe.sharing is not None and recipe.sharing.search is not None:
        check_budget(Units(model.geometry), treatments, recipe.sharing.search, recipe.origin)


def _check_cache(model: Model, treatments: Sequence[Treatment], search: "CacheSearch", origin: "Origin") -> None:
    units, limit = Units(model.geometry), positions(model.checkpoint.config)
    if limit is not None and search.at > limit:
        raise RecipeError(
            f"{origin.at('search', 'at')}: the model has positions for {limit} tokens, so its cache never holds "
            f"{search.at}: write {limit} or less."
        )
    if not any(layer.cached and layer.heads for layer in model.geometry.layers):
        raise RecipeError(f"{origin.at('search')}: the model caches nothing, so no part of its cache can be saved.")
    if not any(treatment.candidates(units) for treatment in treatments):
        raise RecipeError(" ".join(treatment.impossible for treatment in treatments))


def _check_own_windows(model: Model, recipe: "Recipe", search: "CacheSearch") -> None:
    """A stock class has one length for all windows, so those that a model has already must be worth a search."""
    size = own_window(model.geometry)
    if engine_of(recipe) is not None and size is not None and size >= search.at:
        raise RecipeError(
            f"{recipe.origin.at('search', 'at')}: windows for {recipe.engine} have one length, and layers of this "
            f"model have {size} tokens already, which saves nothing at {search.at}: write more than {size}."
        )


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


def more_than_the_cache(asked: float, most: float, origin: "Origin") -> RecipeError:
    """The same of a search for a part of the whole cache, after it has ended."""
    return RecipeError(
        f"{origin.at('search', 'cache')}: {asked * 100:.4g}% of the cache is more than these treatments can save of "
        f"this model, which is {most:.1%} at the most: write {math.floor(most * 100)}% or less."
    )
