"""What a recipe leaves open about healing, as the plan and the model decide it."""

import os
from typing import TYPE_CHECKING

from sa_convert.errors import RecipeError
from sa_convert.models.placement import positions
from sa_convert.plan.conversion import ConversionPlan

if TYPE_CHECKING:
    from sa_convert.domain.heal_settings import HealSettings
    from sa_convert.domain.recipe import Recipe


def resolve(
    settings: "HealSettings", recipe: "Recipe", conversion: ConversionPlan, *, options: bool = False
) -> "HealSettings":
    """With everything spelled out. options: the settings are of the command line, not of the recipe.

    Raises RecipeError, naming the key or the option, for what the model cannot do.
    """
    windows, most = "window" in conversion.plan.treatments, positions(conversion.model.checkpoint.config)
    try:
        return settings.resolved(recipe.calibration.text, windows, most, int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError as error:
        path = getattr(error, "path", ())
        if options:
            raise RecipeError(f"--{'-'.join(map(str, path))}: {error}.") from None
        key = ".".join(map(str, ("heal", *path)))
        raise RecipeError(f"{recipe.origin.at('heal', *path)}: {key}: {error}") from None
