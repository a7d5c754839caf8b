"""`sa-convert push`: upload a conversion to the Hub."""

from pathlib import Path

import click

from sa_convert.commands.options import announce, echo_json, json_option


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repo_id", metavar="REPO_ID")
@click.option("--private", is_flag=True, help="Make the repository private; refused where it is public already.")
@click.option("--revision", metavar="BRANCH", help="Branch to upload to, made where it is missing; default: main.")
@click.option(
    "--allow-unvalidated", is_flag=True, help="Push a folder of which nothing was measured (convert --no-validate)."
)
@json_option
def command(
    folder: Path, repo_id: str, private: bool, revision: str | None, allow_unvalidated: bool, as_json: bool
) -> None:
    """Upload the conversion in DIR to REPO_ID on the Hub, with its model card, in one commit.

    DIR must be complete, as `convert` left it, and its gate passed. The repository is made where it is missing. Where
    the connection was lost, run the same command again: what has arrived is not sent twice. The token is the one of
    `hf auth login` or HF_TOKEN.

    \b
    Examples:
      sa-convert push ./Llama-3-8B-shared my-org/Llama-3-8B-shared
      sa-convert push ./out me/model --private --revision balanced
    """
    from dataclasses import asdict

    from sa_convert.present.hub.complete import complete_conversion
    from sa_convert.present.hub.upload import check_target, push

    conversion = complete_conversion(folder, allow_unvalidated)
    if conversion.left_out:
        names = ", ".join(path.as_posix() for path in conversion.left_out)
        click.echo(f"not uploaded, since no part of the conversion: {names}", err=True)
    pushed = push(conversion, check_target(repo_id, private, revision), announce)
    if as_json:
        echo_json(asdict(pushed))
    else:
        click.echo(pushed.url)
