"""`sa-convert inspect`: what a model is, and what of it can be shared."""

import click

from sa_convert.commands.options import echo_json, json_option, model_argument


@click.command()
@model_argument
@json_option
def command(model: str, as_json: bool) -> None:
    """Show a model's layers, heads and sizes, and what can be shared.

    Only config.json and the headers of the weights are read. A .gguf file is shown as it is after it is dequantised.
    """
    from sa_convert.jobs.inspecting import inspect
    from sa_convert.present.terminal.inspection_text import render_inspection

    inspection = inspect(model)
    if as_json:
        echo_json(inspection.to_json())
    else:
        click.echo(render_inspection(inspection))
