"""`sa-convert bench`: how fast a model is, against another."""

from pathlib import Path
from typing import Any

import click

from sa_convert.commands.options import (
    device_option,
    dtype_option,
    echo_json,
    json_option,
    model_argument,
    trust_any_option,
)


class NumbersType(click.ParamType):
    """Whole numbers from 1 on, such as 128,512; the command receives them in their order, each once."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        numbers = []
        for part in str(value).split(","):
            try:
                number = int(part)
            except ValueError:
                self.fail(f"'{part.strip()}' is no whole number; write them as 128,512.", param, ctx)
            if number < 1:
                self.fail(f"{number} is less than 1.", param, ctx)
            numbers.append(number)
        return tuple(dict.fromkeys(numbers))


NUMBERS = NumbersType()

_OF_TURNS = ("contexts", "steps", "repeats", "seed", "threads", "dtype", "device", "trust")
_NOT_OF_TURNS = {"batches": "--batches", "warmup": "--warmup", "attention": "--attn", "static": "--cache"}


@click.command()
@model_argument
@click.option("--against", metavar="BASE", help="The model to compare with, such as the base of MODEL.")
@click.option(
    "--turns",
    type=click.IntRange(min=2),
    metavar="N",
    help="Time a conversation of N turns instead: its first tokens, with the cache kept in a file and without. BASE "
    "may be left out; --contexts is the conversation's tokens (4096).",
)
@click.option(
    "--message", type=click.IntRange(min=1), default=128, show_default=True, help="With --turns: tokens of a message."
)
@click.option(
    "--contexts",
    type=NUMBERS,
    metavar="N,...",
    help="Tokens of the prompt. Default: those of 128,512,2048,4096 for which the models have positions.",
)
@click.option("--batches", type=NUMBERS, default="1,4", show_default=True, metavar="N,...", help="Sequences at once.")
@click.option(
    "--new-tokens",
    "steps",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Decode steps after each prefill.",
)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Turns that count.")
@click.option(
    "--warmup", type=click.IntRange(min=0), default=1, show_default=True, help="Turns before those that count."
)
@dtype_option("both are run (auto: as BASE is stored), and of weights read from a .gguf file")
@device_option
@click.option("--threads", type=click.IntRange(min=1), help="Of torch, on a CPU. Default: as many as torch takes.")
@click.option(
    "--attn", "attention", type=click.Choice(["eager", "sdpa"]), help="Default: what transformers chooses, mostly sdpa."
)
@click.option(
    "--cache",
    "static",
    type=click.Choice(["dynamic", "static"]),
    default="dynamic",
    show_default=True,
    callback=lambda context, option, kind: kind == "static",
    help="dynamic: the one that the model makes for itself. static: of the size that is needed.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random tokens.")
@trust_any_option
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Folder to make: bench.json, .md and .png."
)
@json_option
@click.pass_context
def command(
    context: click.Context,
    model: str,
    against: str | None,
    turns: int | None,
    message: int,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Time MODEL against BASE, side by side, and compare their memory.

    Each model runs in a process of its own, and both are in memory. They take turns: a prefill each, then a few decode
    steps each, and so on, so that noise of the machine hits both alike. Ratios are medians over pairs of such runs,
    with quartiles. Beside them stands the ratio that one expects from the work of both. The input is random tokens,
    since the speed does not depend on them.

    An encoder-decoder reads the context in its encoder and in its decoder. A model that caches nothing is timed in one
    pass.

    \b
    Examples:
      sa-convert bench ./Llama-3-8B-shared --against ./Llama-3-8B
      sa-convert bench ./shared --against ./base --contexts 512,4096 --batches 4 --threads 2 -o bench
      sa-convert bench ./shared --turns 6 -o turns
    """
    if turns is not None:
        benchmark, text = _turns(context, model, against, (turns, message), output)
    elif against is None:
        raise click.MissingParameter(param_hint="'--against'", param_type="option")
    else:
        from sa_convert.jobs.benchmarking import BenchOptions, bench
        from sa_convert.present.terminal.benchmark_text import render_benchmark

        benchmark = bench(model, against, BenchOptions(**options), output)
        text = render_benchmark(benchmark)
    if as_json:
        echo_json(benchmark.to_json())
        return
    click.echo(text)
    if output is not None:
        click.echo(f"\nWritten to {output}")


def _turns(
    context: click.Context, model: str, against: str | None, lengths: tuple[int, int], output: Path | None
) -> tuple[Any, str]:
    """The result of --turns, and its text. Options that say nothing of a conversation are refused."""
    from click.core import ParameterSource

    from sa_convert.jobs.timing_turns import Lengths, time_turns
    from sa_convert.measure.speed.request import BenchOptions
    from sa_convert.present.terminal.turns_text import render_turns

    for name, option in _NOT_OF_TURNS.items():
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{option} and --turns do not go together.")
    options = BenchOptions(**{name: context.params[name] for name in _OF_TURNS})
    benchmark = time_turns(model, against, Lengths(*lengths), options, output)
    return benchmark, render_turns(benchmark)
