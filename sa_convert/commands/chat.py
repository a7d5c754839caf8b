"""`sa-convert chat`: a conversation with a model."""

import sys
from pathlib import Path
from typing import Any

import click

from sa_convert.commands.options import device_option, dtype_option, model_argument, trust_any_option


@click.command()
@model_argument
@click.option(
    "--session",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Keep the conversation in FILE. If it is there, go on where it was.",
)
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@click.option(
    "--max-new-tokens", "most", type=click.IntRange(min=1), default=512, show_default=True, help="Of an answer."
)
@click.option(
    "--context",
    type=click.IntRange(min=16),
    metavar="N",
    help="Tokens of the conversation; beyond them the oldest turns go. Default: as many as the model has positions.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    help="0: always the likeliest token. Default: as generation_config.json says.",
)
@click.option("--seed", type=int, help="Of what is drawn if the temperature is not 0.")
@dtype_option("the model is run (auto: as stored), and of weights read from a .gguf file")
@device_option
@trust_any_option
def command(model: str, **options: Any) -> None:
    """Talk to MODEL. What it has read is not computed again, with --session not in the next process either.

    Type a message and Enter. Ctrl-C stops an answer, /exit or Ctrl-D ends the conversation. If the input is no
    terminal, all of it is one message, and the answer is printed.

    The session's file holds the cache, so it is as large as that. It is of use to the same model, in the same dtype and
    release of transformers.

    \b
    Examples:
      sa-convert chat ./Llama-3-8B-shared
      sa-convert chat ./Llama-3-8B-shared --session novel.session --system "You are an editor."
      sa-convert chat ./Llama-3-8B-shared --session novel.session --temperature 0 < question.txt
    """
    from sa_convert.jobs.chatting import ChatOptions, chat

    asked = _typed if sys.stdin.isatty() else _Piped()
    chat(model, ChatOptions(**options), asked, lambda text: click.echo(text, nl=False))


def _typed() -> str | None:
    """A line from the terminal, with its history; None at Ctrl-D."""
    import readline  # noqa: F401 (gives input() a history)

    try:
        return input("> ")
    except EOFError:
        click.echo()
        return None


class _Piped:
    """All of the input, once."""

    def __init__(self) -> None:
        self._read = False

    def __call__(self) -> str | None:
        if self._read:
            return None
        self._read = True
        return sys.stdin.read().removesuffix("\n")
