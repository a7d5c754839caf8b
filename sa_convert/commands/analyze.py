"""`sa-convert analyze`: what sharing would cost a model, and where."""

from pathlib import Path
from typing import Any

import click

from sa_convert.commands.options import (
    PERCENT,
    device_option,
    dtype_option,
    echo_json,
    json_option,
    model_argument,
    trust_option,
)


@click.command("analyze")
@model_argument
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder to make.")
@click.option(
    "--key-cache",
    type=PERCENT,
    default="25%",
    show_default=True,
    metavar="PERCENT",
    help="Part of the key cache that the recipe is to remove.",
)
@click.option(
    "--calibration",
    "text",
    default="builtin",
    show_default=True,
    metavar="TEXT",
    help="builtin, a .txt, .md or .jsonl file, or hub:DATASET[:CONFIG[:SPLIT]]. Its calibration part is used.",
)
@click.option("--sequences", type=click.IntRange(min=2), default=32, show_default=True, help="Sequences of text.")
@click.option("--length", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of a sequence.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything that is random.")
@dtype_option("the model is run (auto: as stored), and of weights read from a .gguf file")
@device_option
@click.option("--overwrite", is_flag=True, help="Replace an earlier result at DIR.")
@trust_option
@json_option
def command(model: str, output: Path, as_json: bool, **options: Any) -> None:
    """Find out what sharing attention would cost MODEL, by KV group.

    The model itself is not changed. DIR appears complete or not at all. It holds:

    \b
      recipe.yaml    a map for `convert`, which removes the part --key-cache
      analysis.json  all numbers behind the figures
      figures/       similarity of layers, isotropy and variance, cost of each KV
                     group, loss against key cache removed, sources

    \b
    Examples:
      sa-convert analyze ./Llama-3-8B -o analysis
      sa-convert convert ./Llama-3-8B --recipe analysis/recipe.yaml -o ./Llama-3-8B-shared
      sa-convert analyze ./model -o analysis --key-cache 10% --calibration my.txt --sequences 16
    """
    from sa_convert.jobs.analyzing import AnalyzeOptions, analyze
    from sa_convert.present.terminal.analysis_text import render_analysis

    if not 0 < options["key_cache"] < 1:
        raise click.BadParameter("must be more than 0% and less than 100%.", param_hint="'--key-cache'")
    analysis = analyze(model, output, AnalyzeOptions(**options))
    if as_json:
        echo_json(analysis.to_json())
    else:
        click.echo(render_analysis(analysis))
        click.echo(f"\nWritten to {output}")
