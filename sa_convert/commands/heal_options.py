"""Options of `sa-convert heal` that recipes have, too: one grammar and one message for both."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from sa_convert.domain.heal_settings import HealSettings


def parse_settings(options: Mapping[str, Any]) -> "tuple[HealSettings, dict[str, Any]]":
    """The settings that the options name, and the options that are none. Raises click.UsageError."""
    from pydantic import ValidationError

    from sa_convert.domain.heal_settings import HealSettings

    named = {key: value for key, value in options.items() if key in HealSettings.model_fields and value is not None}
    whole: dict[str, Any] = {
        key: int(value) if isinstance(value, str) and value.isdigit() else value for key, value in named.items()
    }
    try:
        settings = HealSettings(**whole)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        told = str(problem.get("ctx", {}).get("error", problem["msg"]))
        raise click.UsageError(f"--{str(problem['loc'][0]).replace('_', '-')}: {told}.") from None
    return settings, {key: value for key, value in options.items() if key not in HealSettings.model_fields}
