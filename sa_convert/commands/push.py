"""`sa-convert push`: upload a conversion to the Hub."""

from pathlib import Path
from typing import Any

import click

from sa_convert.commands.options import echo_json, json_option


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repo_id", metavar="REPO_ID")
@click.option("--private", is_flag=True, help="Make the repository private. Refused if it is public already.")
@click.option("--revision", metavar="BRANCH", help="Branch to upload to. If it is missing, it is made. Default: main.")
@click.option(
    "--allow-unvalidated", is_flag=True, help="Push a folder even if nothing was measured (convert --no-validate)."
)
@json_option
def command(folder: Path, repo_id: str, as_json: bool, **options: Any) -> None:
    """Upload the conversion in DIR to REPO_ID on the Hub.

    It goes up whole, model card included, in one commit.
    DIR must be complete, as `convert` left it, and its gate passed. If the repository is missing, it is made. If the
    connection is lost, run the same command again: what has arrived is not sent twice. The token is that of
    `hf auth login` or HF_TOKEN.

    \b
    Examples:
      sa-convert push ./Llama-3-8B-shared my-org/Llama-3-8B-shared
      sa-convert push ./out me/model --private --revision balanced
    """
    from dataclasses import asdict

    from sa_convert.jobs.pushing import PushOptions, push

    pushed = push(folder, repo_id, PushOptions(**options))
    if as_json:
        echo_json(asdict(pushed))
    else:
        click.echo(pushed.url)
