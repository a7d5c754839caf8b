"""`sa-convert heal`: a little training after conversion."""

from pathlib import Path
from typing import Any

import click

from sa_convert.commands.options import (
    PERCENT,
    device_option,
    dtype_option,
    echo_json,
    json_option,
    trust_any_option,
)


@click.command("heal")
@click.argument("folder", metavar="DIR")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR2", help="Folder to make.")
@click.option(
    "--against", metavar="MODEL", help="The base of DIR. Default: as its report.json names it, if it is a folder here."
)
@click.option("--tokens", metavar="N", help="Tokens to train on, such as 400k or 2M. Default: 400k.")
@click.option(
    "--minutes", metavar="N", help="Minutes, the text that the base writes included. With --tokens: whatever is first."
)
@click.option(
    "--text",
    metavar="TEXT",
    help="builtin, written (by the base itself), builtin+written, a .txt, .md or .jsonl file, or "
    "hub:DATASET[:CONFIG[:SPLIT]]. Its calibration part is used. Default: the recipe's; builtin+written if that is "
    "builtin.",
)
@click.option(
    "--train",
    type=click.Choice(["outputs", "layers", "model", "lora"]),
    help="outputs: values and outputs of changed layers, and what treatments added. layers: all of these layers. "
    "lora: low-rank additions to them, merged in the end. model: all layers.  [default: outputs]",
)
@click.option("--length", metavar="N", help="Tokens of a sequence. Default: 512, or 2048 if there are windows.")
@click.option("--rows", metavar="N", help="Sequences of one step, on all processes together.  [default: one on each]")
@click.option(
    "--rate",
    metavar="R",
    help="Peak learning rate. Default: 5e-4; 1e-4 if there are windows, or for layers and model; 1e-3 for lora.",
)
@click.option("--rank", metavar="N", help="Of the additions of --train lora.  [default: 16]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of rows and their order.")
@click.option(
    "--accumulate", type=click.IntRange(min=1), default=1, show_default=True, help="Parts of a step, for less memory."
)
@click.option("--gradient-checkpointing", is_flag=True, help="Less memory for more time.")
@click.option("--resume", is_flag=True, help="Go on with a run that was interrupted.")
@click.option(
    "--max-perplexity-increase",
    type=PERCENT,
    metavar="PERCENT",
    help="The gate, for example 5%. Default: that of the recipe in DIR.",
)
@click.option(
    "--no-validate",
    "validate",
    is_flag=True,
    callback=lambda context, option, given: not given,
    help="Do not measure the result against the base. The report then claims no quality but that of the judge.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier result at DIR2.")
@dtype_option("is computed (auto: as stored); what trains is float32")
@device_option
@trust_any_option
@json_option
def command(folder: str, output: Path, as_json: bool, **options: Any) -> None:
    """Train the converted model in DIR a little towards its base, and write it to DIR2.

    Every so often it is judged on held-out text and on held-out copying, and the best state by both is kept. If it is
    worse than before on either, the exit status is 3 and there is no DIR2. Only tensors that trained differ.

    A run that is interrupted leaves DIR2.healing behind, with which --resume goes on.

    \b
    Examples:
      sa-convert heal ./shared --against ./base -o ./healed --minutes 15
      sa-convert heal ./shared -o ./healed --tokens 2M --text hub:org/corpus
      accelerate launch --num_processes 8 -m sa_convert heal ./shared -o ./healed --tokens 20M --rows 32
    """
    from sa_convert.commands.heal_options import parse_settings
    from sa_convert.jobs.healing import HealOptions, heal_folder

    settings, rest = parse_settings(options)
    report = heal_folder(folder, output, settings, HealOptions(**rest))
    if report is None:  # another process tells
        return
    if as_json:
        echo_json(report.to_json())
        return
    from sa_convert.present.terminal.report_text import render_report

    click.echo(render_report(report))
    click.echo(f"\nWritten to {output}")
