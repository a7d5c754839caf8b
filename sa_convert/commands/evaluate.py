"""`sa-convert evaluate`: how good a model is, alone or against another."""

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


@click.command()
@model_argument
@click.option("--against", metavar="MODEL", help="Another model. It is measured on the same tokens, and compared with.")
@click.option(
    "--text",
    "source",
    default="builtin",
    show_default=True,
    metavar="TEXT",
    help="builtin, a .txt, .md or .jsonl file, or hub:DATASET[:CONFIG[:SPLIT]]. Its validation part is used.",
)
@click.option("--sequences", type=click.IntRange(min=1), default=16, show_default=True, help="Sequences of text.")
@click.option(
    "--length",
    type=click.IntRange(min=2),
    help="Tokens of a sequence. Default: 512, or the positions of the model if it has fewer.",
)
@click.option(
    "--long",
    type=click.IntRange(min=0),
    metavar="N",
    help="Tokens of long texts: perplexity by position, copying from up to half as far, needles. 0: none. Default: "
    "2048, or the positions of the model if it has fewer; none if that is 512 or less.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random tokens of probes and needles.")
@dtype_option("the models are run (auto: as stored), and of weights read from a .gguf file")
@device_option
@trust_any_option
@json_option
def command(model: str, against: str | None, source: str, as_json: bool, **options: Any) -> None:
    """Measure the quality of MODEL, alone or against another.

    Measured are perplexity, cached decoding, and copying from the context; in long text perplexity by position, too,
    copying by distance, and how well planted code words are found (needles). Give --long the length that you will use.
    With --against it also measures the other model, KL divergence and top-1 agreement. The two models are never both in
    memory. A converted model runs by the code in its folder, if that is what sa-convert writes.

    For a masked language model, perplexity is that of masked tokens. For an encoder-decoder, it is that of spans which
    the encoder does not see (teacher-forced). What does not apply to a model is left out.

    \b
    Examples:
      sa-convert evaluate ./Llama-3-8B-shared --against ./Llama-3-8B
      sa-convert evaluate ./Llama-3-8B-shared --against ./Llama-3-8B --long 8192
      sa-convert evaluate ./model --text my.txt --sequences 32 --json
    """
    from sa_convert.jobs.evaluating import EvaluateOptions, evaluate
    from sa_convert.present.terminal.evaluation_text import render_evaluation
    from sa_convert.texts.text import load_text

    evaluation = evaluate(model, against, load_text(source), EvaluateOptions(**options))
    if as_json:
        echo_json(evaluation.to_json())
    else:
        click.echo(render_evaluation(evaluation))
