"""`sa-convert audit`: whether the code in a converted model is as sa-convert writes it."""

import click

from sa_convert.commands.options import echo_json, json_option


@click.command()
@click.argument("model", metavar="DIR|REPO_ID")
@json_option
@click.pass_context
def command(ctx: click.Context, model: str, as_json: bool) -> None:
    """Say whether the code in a model is as sa-convert writes it.

    The model is a folder, or org/name[@revision] on the Hub. Each code file is compared, by its SHA-256, with what this
    version and listed earlier ones write. Nothing is run.

    Exit status: 0 if every file is as sa-convert writes it. 1 if one is not, if one is missing, or if a config names
    code that is not sa-convert's.

    \b
    Examples:
      sa-convert audit ./Llama-3-8B-shared
      sa-convert audit my-org/Llama-3-8B-shared --json
    """
    from dataclasses import asdict

    from sa_convert.errors import CheckpointError
    from sa_convert.jobs.auditing import audit

    done = audit(model)
    if as_json:
        echo_json({**asdict(done), "passed": done.fault is None})
        ctx.exit(int(done.fault is not None))
    for file in done.files:
        click.echo(f"{file.sha256[:16]}  {file.name}: {file.written_by or 'NOT as sa-convert writes it'}")
    if done.engine is not None and not done.files:
        click.echo(f"no code: written for {done.engine}, transformers and the engine run classes of their own")
    for name in done.missing:
        click.echo(f"{'-' * 16}  {name}: MISSING")
    if done.fault is not None:
        raise CheckpointError(f"{model}: {done.fault}: look at it before you let it run, or convert the model again.")
