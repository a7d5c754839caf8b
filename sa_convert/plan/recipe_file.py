"""Reading recipes from files, the shipped ones included, and writing them.

Every error is one line that names the file and the line in it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sa_convert
from sa_convert.domain.plan import plain
from sa_convert.errors import RecipeError
from sa_convert.plan.recipe_errors import did_you_mean, explain, keys_of
from sa_convert.plan.yaml_lines import parse_yaml
from sa_convert.treatments.base import Treatment
from sa_convert.treatments.registry import named, treatments

if TYPE_CHECKING:
    from sa_convert.domain.recipe import Origin, Recipe

_SUFFIXES = (".yaml", ".yml", ".json")
_LARGEST = 16 * 1024 * 1024


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name: inside of it (wheel) or beside it (checkout)."""
    package = Path(sa_convert.__file__).parent
    folder = next((path for path in (package / "recipes", package.parent / "recipes") if path.is_dir()), None)
    if folder is None:
        raise RecipeError(f"The shipped recipes are missing from {package}; install sa-convert again.")
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(name_or_path: str) -> "Recipe":
    """A shipped recipe by its name, or one from a file: whatever ends in .yaml, .yml or .json or has a slash in it.

    Raises RecipeError.
    """
    return parse_recipe(*_find(name_or_path))


def recipe_text(name_or_path: str) -> str:
    """What `load_recipe` reads, as it is written, comments included. Raises RecipeError if it is not valid."""
    text, name = _find(name_or_path)
    parse_recipe(text, name)
    return text


def _find(name_or_path: str) -> tuple[str, str]:
    """The text of a recipe, and the name of its file for messages."""
    if name_or_path.lower().endswith(_SUFFIXES) or "/" in name_or_path or "\\" in name_or_path:
        return _read(Path(name_or_path), name_or_path), name_or_path
    shipped = shipped_recipes()
    if name_or_path in shipped:
        path = shipped[name_or_path]
        return _read(path, path.name), path.name
    hint = did_you_mean(name_or_path, shipped) or "."
    if Path(name_or_path).is_file():
        hint = f"; to use the file of that name, write ./{name_or_path}."
    raise RecipeError(
        f"There is no shipped recipe '{name_or_path}'{hint} `sa-convert recipes` lists them; "
        "a recipe of your own is a file that ends in .yaml."
    )


def parse_recipe(text: str, file: str) -> "Recipe":
    """A recipe from YAML (or JSON) text; `file` names it in errors. Raises RecipeError."""
    from pydantic import ValidationError

    from sa_convert.domain.recipe import Origin, Recipe

    # Tabs may indent JSON but not YAML; JSON has none inside of its texts.
    is_json = file.lower().endswith(".json")
    value, lines = parse_yaml(text.replace("\t", " ") if is_json else text, file, numbers=is_json)
    origin = Origin(file, lines)
    if value is None:
        raise RecipeError(f"{file} is empty; a recipe needs at least one of the keys 'search', 'plan' and 'sharing'.")
    if not isinstance(value, Mapping):
        raise RecipeError(f"{origin.at()}: a recipe is a mapping of keys ({', '.join(keys_of(Recipe))})")
    try:
        recipe = Recipe.model_validate(value).written_at(origin)
    except ValidationError as error:
        raise RecipeError(explain(error, origin)) from None
    _check_treatments(recipe)
    return recipe


def _check_treatments(recipe: "Recipe") -> None:
    """Raises RecipeError for a treatment that there is not, or arguments that it cannot have."""
    for at, name in enumerate(recipe.treatments or ()):
        _treatment(name, recipe.origin.at("treatments", at))
    for layer, plan in (recipe.plan or {}).items():
        if isinstance(plan, str):
            _treatment(plan, recipe.origin.at("plan", layer))
            continue
        for group, told in plan.items():
            if isinstance(group, str):  # a treatment of the whole layer
                where = recipe.origin.at("plan", layer, group)
                if named(group) is None and not did_you_mean(group, [treatment.name for treatment in treatments()]):
                    raise RecipeError(f"{where}: {group!r} is not a KV group of layer {layer}; write its number")
                treatment = _treatment(group, where)
                if treatment.for_all is None:
                    raise RecipeError(f"{where}: layer {layer}: {group} has no arguments for a whole layer")
                _check_arguments(treatment, told, f"layer {layer}", recipe.origin, ("plan", layer, group))
                continue
            for name, arguments in told.items():
                treatment = _treatment(name, recipe.origin.at("plan", layer, group, name))
                where = f"layer {layer} KV group {group}"
                _check_arguments(treatment, arguments, where, recipe.origin, ("plan", layer, group, name))


def _check_arguments(
    treatment: Treatment, arguments: Any, where: str, origin: "Origin", path: tuple[str | int, ...]
) -> None:
    """Raises RecipeError for arguments that a treatment cannot have. where, path: of them, in words and in the file."""
    try:
        treatment.parse(arguments)
    except ValueError as error:
        raise RecipeError(f"{origin.at(*path, *getattr(error, 'path', ()))}: {where}: {error}") from None


def _treatment(name: str, where: str) -> Treatment:
    found = named(name)
    if found is None:
        known = [treatment.name for treatment in treatments()]
        hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
        raise RecipeError(f"{where}: there is no treatment '{name}'{hint}")
    return found


def dump_recipe(recipe: "Recipe") -> str:
    """The recipe as YAML that loads as an equal recipe. Each layer of a map or plan stays on one line."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    class OneLine(list):
        pass

    class Inline(dict):
        pass

    Dumper.add_representer(OneLine, lambda d, data: d.represent_sequence("tag:yaml.org,2002:seq", data, True))
    Dumper.add_representer(Inline, lambda d, data: d.represent_mapping("tag:yaml.org,2002:map", data, True))

    content = recipe.model_dump(by_alias=True)
    engine = content.pop("for")
    if engine != "transformers":
        content = {"description": content.pop("description"), "for": engine, **content}
    if recipe.search is None:
        del content["search"]
    else:
        content["search"] = Inline(recipe.search.model_dump(exclude_none=True))
    if (sharing := recipe.sharing) is None:
        del content["sharing"]
    else:
        content["sharing"] = {}
        if sharing.map is not None:
            rows = sharing.map.items()
            content["sharing"]["map"] = {
                layer: OneLine(None if source is None else list(source) for source in row) for layer, row in rows
            }
        if sharing.search is not None:
            content["sharing"]["search"] = Inline(sharing.search.model_dump(exclude_none=True))
        if sharing.spans is not None:
            content["sharing"]["spans"] = [span.model_dump(exclude_none=True) for span in sharing.spans]
    if recipe.plan is None:
        del content["plan"]
    else:
        layers = recipe.plan.items()
        content["plan"] = {layer: plan if isinstance(plan, str) else Inline(plain(plan)) for layer, plan in layers}
    if recipe.treatments is None:
        del content["treatments"]
    else:
        content["treatments"] = OneLine(recipe.treatments)
    if recipe.heal is None:
        del content["heal"]
    else:
        content["heal"] = Inline(recipe.heal.model_dump(exclude_defaults=True))
    content["gate"] = Inline(recipe.gate.model_dump(exclude_none=True))
    if not recipe.description:
        del content["description"]
    if recipe.needs or _fits(recipe) or recipe.heal is not None:
        content["calibration"] = Inline(content["calibration"])
    else:
        del content["calibration"]
    return yaml.dump(content, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)


def _fits(recipe: "Recipe") -> bool:
    """Whether a treatment of the recipe's plan fits something on calibration text."""
    plans = list((recipe.plan or {}).values())
    names = {plan for plan in plans if isinstance(plan, str)}
    for plan in [plan for plan in plans if not isinstance(plan, str)]:
        names |= {name for group, told in plan.items() for name in ([group] if isinstance(group, str) else told)}
    return any(treatment.fits for treatment in map(named, names) if treatment is not None)


def _read(path: Path, name: str) -> str:
    try:
        with path.open("rb") as stream:
            content = stream.read(_LARGEST + 1)
    except FileNotFoundError:
        raise RecipeError(f"There is no recipe file '{name}'. `sa-convert recipes` lists the shipped ones.") from None
    except IsADirectoryError:
        raise RecipeError(f"'{name}' is a folder, not a recipe; give the .yaml file itself.") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"Cannot read the recipe '{name}': {getattr(error, 'strerror', None) or error}.") from None
    if len(content) > _LARGEST:
        raise RecipeError(f"'{name}' is larger than {_LARGEST >> 20} MiB, which no recipe is.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{name}, line {line}: the file is not UTF-8 text") from None
