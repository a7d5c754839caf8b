"""Explicit plans and maps of a recipe: what no model could run is refused here, the rest where the model is known."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

HeadSource = tuple[int, int]
"""A source layer and a query head in it."""

_LAYER_KEY = re.compile(r"(encoder\.|decoder\.|decoder\.cross\.|)(0|[1-9]\d*)")


class RecipeValueError(ValueError):
    """An impossible value; `path` leads from the value that was checked to the key or item that is to blame."""

    def __init__(self, message: str, *path: str | int) -> None:
        super().__init__(message)
        self.path = path


def parse_map(value: object) -> dict[int | str, tuple[HeadSource | None, ...]]:
    """Layer -> per query head None or (source layer, source head), in the order of the file.

    Layers are whole numbers, or texts of them ("27"), or name a stack ("decoder.cross.3"). Raises RecipeValueError.
    """
    if not isinstance(value, Mapping):
        raise RecipeValueError(f"map should list heads for each layer, such as {{27: [[26, 4], null]}}, not {value!r}")
    layers: dict[int | str, tuple[HeadSource | None, ...]] = {}
    for key, row in value.items():
        layer, index = _layer(key)
        if layer in layers:
            raise RecipeValueError(f"layer {layer} is listed twice", key)
        layers[layer] = _parse_row(row, layer, index, key)
    if not any(source for row in layers.values() for source in row):
        raise RecipeValueError("the map shares nothing; give at least one head a source, [layer, head]")
    return layers


def parse_plan(value: object) -> dict[int | str, Any]:
    """Layer -> {KV group: {treatment: arguments}} or the treatment of the whole layer, with arguments or
    without, in the order of the file.

    Treatments and their arguments are checked where they are known. Raises RecipeValueError.
    """
    if not isinstance(value, Mapping) or not value:
        raise RecipeValueError(
            f"plan should list KV groups for each layer, such as {{27: {{0: {{share: [[26, 4]]}}}}}}, not {value!r}"
        )
    layers: dict[int | str, Any] = {}
    for key, plan in value.items():
        layer = _layer(key)[0]
        if layer in layers:
            raise RecipeValueError(f"layer {layer} is listed twice", key)
        if not isinstance(plan, str) and (not isinstance(plan, Mapping) or not plan):
            raise RecipeValueError(
                f"layer {layer} should be the name of a treatment, or {{KV group: {{treatment: arguments}}}}, not "
                f"{_short(plan)}",
                key,
            )
        whole = len(plan) == 1 and all(isinstance(name, str) for name in plan)
        for group, treatments in () if whole or isinstance(plan, str) else plan.items():
            if not isinstance(group, int) or isinstance(group, bool) or group < 0:
                raise RecipeValueError(f"{group!r} is not a KV group of layer {layer}; write its number", key, group)
            named = isinstance(treatments, Mapping) and all(isinstance(name, str) for name in treatments)
            if not named or not treatments:
                raise RecipeValueError(
                    f"layer {layer} KV group {group} should be {{treatment: arguments}}, not {_short(treatments)}",
                    key,
                    group,
                )
        layers[layer] = plan
    return layers


def _layer(key: object) -> tuple[int | str, int]:
    """A layer as a recipe names it, and its number in its stack. Raises RecipeValueError."""
    match = None if isinstance(key, bool) else _LAYER_KEY.fullmatch(str(key))
    if match is None:
        raise RecipeValueError(
            f"{key!r} is not a layer; write its number (27), after encoder. or decoder. if the model has both",
            key,  # type: ignore[arg-type]
        )
    return (match[0] if match[1] else int(match[2])), int(match[2])


def _parse_row(row: object, layer: int | str, index: int, key: str | int) -> tuple[HeadSource | None, ...]:
    if not _is_list(row) or not row:
        raise RecipeValueError(
            f"layer {layer} should list null or [source layer, source head] for each query head, not {row!r}", key
        )
    heads: list[HeadSource | None] = []
    for head, source in enumerate(row):  # type: ignore[arg-type, var-annotated]
        if source is None:
            heads.append(None)
            continue
        numbers = [n for n in source if isinstance(n, int) and not isinstance(n, bool)] if _is_list(source) else []
        if len(numbers) != 2 or len(source) != 2 or min(numbers) < 0:
            raise RecipeValueError(
                f"layer {layer} head {head} should be null or [source layer, source head], not {_short(source)}",
                key,
                head,
            )
        if numbers[0] >= index:
            raise RecipeValueError(
                f"layer {layer} head {head} borrows from layer {numbers[0]}, which is not before it; name one before",
                key,
                head,
            )
        heads.append((numbers[0], numbers[1]))
    return tuple(heads)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
