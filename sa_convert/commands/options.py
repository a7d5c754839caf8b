"""Arguments and options that several commands have, so that they look and work alike."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import click

from sa_convert.console.amounts import parse_percent


class PercentType(click.ParamType):
    """A percentage such as 5%; the command receives the fraction, 0.05."""

    name = "percent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            return parse_percent(value)
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)


PERCENT = PercentType()

model_argument = click.argument("model", metavar="MODEL")
trust_option = click.option(
    "--trust-remote-code",
    "trust",
    is_flag=True,
    help="Run code that MODEL brings along. Its files are named first.",
)
trust_any_option = click.option(
    "--trust-remote-code",
    "trust",
    is_flag=True,
    help="Run code in the folders of models, even if it is not sa-convert's.",
)
device_option = click.option(
    "--device", default="auto", show_default=True, metavar="DEVICE", help="For example cpu, cuda or cuda:1."
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else, on stdout."
)


def dtype_option(what: str) -> Callable[[Any], Any]:
    """what: in the help, that is of this precision."""
    return click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help=f"Precision in which {what}.",
    )


def echo_json(content: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    click.echo(json.dumps(content, indent=2, ensure_ascii=False))
