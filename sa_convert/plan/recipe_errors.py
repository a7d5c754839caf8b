"""What pydantic finds wrong with a recipe, as one line for its author."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

    from sa_convert.domain.recipe import Origin

_EXPECTED = {
    "model_type": "a mapping of keys and values",
    "dict_type": "a mapping of keys and values",
    "tuple_type": "a list",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "literal_error": "{expected}",
    "greater_than_equal": "{ge} or more",
    "too_short": "a list with at least one item",
}


def explain(error: "ValidationError", origin: "Origin") -> str:
    """One line about the first problem in the file; an unknown key comes first, since it may explain a missing one."""
    from pydantic import BaseModel

    from sa_convert.domain.heal_settings import HealSettings
    from sa_convert.domain.recipe import CacheSearch, Calibration, Gate, Recipe, Search, Sharing, Span

    models: dict[tuple[str, ...], type[BaseModel]] = {
        (): Recipe,
        ("search",): CacheSearch,
        ("sharing",): Sharing,
        ("sharing", "spans"): Span,
        ("sharing", "search"): Search,
        ("calibration",): Calibration,
        ("heal",): HealSettings,
        ("gate",): Gate,
    }
    found = []
    for problem in error.errors(include_url=False):
        kind, path = problem["type"], tuple(problem["loc"])
        context: dict[str, Any] = problem.get("ctx", {})
        if kind == "value_error":
            path += getattr(context["error"], "path", ())
            text = str(context["error"])
            if path and not hasattr(context["error"], "path"):
                text = f"{_dotted(path)}: {text}"
        elif kind in ("extra_forbidden", "invalid_key", "missing"):
            parent, key = path[:-1], str(path[-1])
            known = keys_of(models[tuple(part for part in parent if isinstance(part, str))])
            under = f" under {_dotted(parent)}" if parent else ""
            if kind == "missing":
                text = f"the key '{key}' is missing{under}"
            else:
                text = f"unknown key '{key}'{under}"
                text += did_you_mean(key, known) or f"; the keys here are {', '.join(known)}"
        else:
            expected = _EXPECTED.get(kind)
            text = f"{_dotted(path)} should be {expected.format(**context)}" if expected else problem["msg"]
            text += f", not {_short(problem['input'])}" if expected else ""
        # A list counts as too short if its items are wrong.
        rank = {"extra_forbidden": 0, "invalid_key": 0, "too_short": 2}.get(kind, 1)
        where = origin.at(*path)
        found.append((rank, int(where.rpartition(" ")[2]), f"{where}: {text}"))
    return min(found)[2]


def keys_of(model: "type[BaseModel]") -> list[str]:
    """The keys of a part of a recipe, as people write them."""
    return [told.alias or name for name, told in model.model_fields.items()]


def _dotted(path: tuple[str | int, ...]) -> str:
    """Such as "sharing.spans[0].layers"."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Such as "; did you mean 'layers'?", or nothing."""
    close = get_close_matches(word, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _short(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
