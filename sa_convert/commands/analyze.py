"""`sa-convert analyze`: what treatments would cost a model, and where."""

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


def treatments_in(names: str | None) -> tuple[str, ...] | None:
    """From the command line. Raises click.BadParameter for a name that there is not."""
    if names is None:
        return None
    from sa_convert.treatments.registry import treatments

    known = [treatment.name for treatment in treatments()]
    found = tuple(name.strip() for name in names.split(","))
    if unknown := [name for name in found if name not in known]:
        raise click.BadParameter(f"there is no treatment '{unknown[0]}': choose among {', '.join(known)}.")
    return found


@click.command("analyze")
@model_argument
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder to make.")
@click.option(
    "--cache",
    type=PERCENT,
    default="50%",
    show_default=True,
    metavar="PERCENT",
    help="Part of the whole cache that recipe.yaml is to save.",
)
@click.option(
    "--at",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Length at which the cache counts. Default: 4096, or the model's positions if they are fewer.",
)
@click.option(
    "--treatments",
    callback=lambda context, option, names: treatments_in(names),
    metavar="NAME,...",
    help="What the search may use, such as window,share. Default: window and share.",
)
@click.option(
    "--key-cache",
    type=PERCENT,
    metavar="PERCENT",
    help="Share attention alone: the part of the key cache that recipe.yaml is to remove.",
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
    """Find out what every treatment would cost MODEL, by KV group, and how much of its cache can be saved for what.

    The model itself is not changed. DIR appears complete or not at all. It holds:

    \b
      recipe.yaml    a plan for `convert`, which saves the part --cache
      frontier.csv   loss and copying for each part of the cache that is saved
      cache-50.yaml  and others: a plan for each point of the frontier
      analysis.json  all numbers behind the figures
      figures/       frontier, costs of each KV group, similarity of layers,
                     isotropy and variance, sources

    With --key-cache, sharing alone is looked at, and its loss against key cache removed.

    \b
    Examples:
      sa-convert analyze ./Llama-3-8B -o analysis
      sa-convert convert ./Llama-3-8B --recipe analysis/cache-75.yaml -o ./Llama-3-8B-smaller
      sa-convert analyze ./model -o analysis --at 8192 --treatments window --calibration my.txt
      accelerate launch --multi_gpu --num_processes 8 -m sa_convert analyze ./Llama-3-70B -o analysis
    """
    from sa_convert.jobs.analyzing import AnalyzeOptions, analyze
    from sa_convert.models.processes import launched
    from sa_convert.present.terminal.analysis_text import render_analysis

    for name, option in (("key_cache", "--key-cache"), ("cache", "--cache")):
        if options[name] is not None and not 0 < options[name] < 1:
            raise click.BadParameter("must be more than 0% and less than 100%.", param_hint=f"'{option}'")
    with launched():
        analysis = analyze(model, output, AnalyzeOptions(**options))
        if analysis is None:  # another process tells
            return
        if as_json:
            echo_json(analysis.to_json())
            return
        click.echo(render_analysis(analysis))
        click.echo(f"\nWritten to {output}")
