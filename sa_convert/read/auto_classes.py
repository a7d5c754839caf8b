"""Until registration.py, which is rewritten elsewhere, imports it from its new place."""

from typing import Any

from sa_convert.families import model_classes


def model_classes_of(family: Any, architecture: str) -> dict[str, str]:
    """For an entry of the carried code's table as well."""
    return model_classes.model_classes_of(family, architecture)
