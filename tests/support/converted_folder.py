"""A tiny base model of a family and its conversion, made by the real command line, for tests of what runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.processes import run_cli
from support.tiny_models import geometry_of_folder, load_converted, make_map, save_tiny, write_recipe


@dataclass(frozen=True)
class Converted:
    """base: the model; rows: the map; folder: of the converted model, beside that of the base."""

    base: Any
    rows: dict
    folder: Path

    @property
    def base_folder(self) -> Path:
        return self.folder.parent / "base"

    def load(self, **options):
        return load_converted(self.folder, **options)


def convert_tiny(root: Path, model_type: str, kind: str, change=None, **changes) -> Converted:
    """Save a tiny model of this type in `root` and convert it by a random map of this kind, without validation.

    change: what is done to the folder of the base before. changes: of its config.
    """
    base = save_tiny(model_type, root / "base", **changes)
    if change:
        change(root / "base")
    geometry = geometry_of_folder(root / "base")
    rows = make_map(kind, geometry, seed=1)
    recipe = write_recipe(root / "recipe.json", rows, geometry.stacks)
    done = run_cli("convert", root / "base", "--recipe", recipe, "-o", root / "out", "--no-validate")
    assert done.returncode == 0, done.stderr
    return Converted(base, rows, root / "out")
