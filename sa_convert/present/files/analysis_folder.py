"""Writes the folder of an analysis: analysis.json, recipe.yaml and figures."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from sa_convert.domain.analysis import Analysis
from sa_convert.plan.recipe_file import dump_recipe
from sa_convert.present.charts.all_charts import write_charts

if TYPE_CHECKING:
    from sa_convert.domain.recipe import Recipe

FILE = "analysis.json"
RECIPE_FILE = "recipe.yaml"
FIGURES = "figures"

_PAIR = r"(?:null|\[\d+, \d+\])"


def write_analysis(analysis: Analysis, recipe: "Recipe", folder: Path) -> None:
    """Write all files. recipe: with the plan of the analysis."""
    text = json.dumps(analysis.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / FILE).write_text(_rows_on_one_line(text) + "\n", encoding="utf-8", newline="\n")
    (folder / RECIPE_FILE).write_text(dump_recipe(recipe), encoding="utf-8", newline="\n")
    write_charts(analysis, folder / FIGURES)


def _rows_on_one_line(text: str) -> str:
    """JSON with each row of a matrix or of a sharing map on one line. No string holds a line break."""

    def joined(row: re.Match[str]) -> str:
        return "[" + re.sub(r"\n\s+", " ", row[1]) + "]"

    text = re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", joined, text)
    return re.sub(rf"\[\n\s+({_PAIR}(?:,\n\s+{_PAIR})*)\n\s+\]", joined, text)
