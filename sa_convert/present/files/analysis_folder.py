"""Writes the folder of an analysis: analysis.json, frontier.csv, recipes and figures."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sa_convert.domain.analysis import Analysis
from sa_convert.domain.frontier import COLUMNS, Frontier
from sa_convert.plan.recipe_file import dump_recipe
from sa_convert.present.charts.all_charts import write_charts
from sa_convert.present.files.json_file import write_json

if TYPE_CHECKING:
    from sa_convert.domain.recipe import Recipe

FILE = "analysis.json"
RECIPE_FILE = "recipe.yaml"
FRONTIER_FILE = "frontier.csv"
FIGURES = "figures"


def write_analysis(analysis: Analysis, recipes: "Mapping[str, Recipe]", folder: Path) -> None:
    """Write all files. recipes: by the name of the file; that of the analysis is RECIPE_FILE."""
    write_json(analysis.to_json(), folder / FILE)
    for name, recipe in recipes.items():
        (folder / name).write_text(dump_recipe(recipe), encoding="utf-8", newline="\n")
    if analysis.frontier is not None:
        write_frontier(analysis.frontier, folder / FRONTIER_FILE)
    write_charts(analysis, folder / FIGURES)


def write_frontier(frontier: Frontier, file: Path) -> None:
    """One line for each point."""
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(frontier.rows())
