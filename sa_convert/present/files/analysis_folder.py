"""Writes the folder of an analysis: analysis.json, recipe.yaml and figures."""

from pathlib import Path
from typing import TYPE_CHECKING

from sa_convert.domain.analysis import Analysis
from sa_convert.plan.recipe_file import dump_recipe
from sa_convert.present.charts.all_charts import write_charts
from sa_convert.present.files.json_file import write_json

if TYPE_CHECKING:
    from sa_convert.domain.recipe import Recipe

FILE = "analysis.json"
RECIPE_FILE = "recipe.yaml"
FIGURES = "figures"


def write_analysis(analysis: Analysis, recipe: "Recipe", folder: Path) -> None:
    """Write all files. recipe: with the plan of the analysis."""
    write_json(analysis.to_json(), folder / FILE)
    (folder / RECIPE_FILE).write_text(dump_recipe(recipe), encoding="utf-8", newline="\n")
    write_charts(analysis, folder / FIGURES)
