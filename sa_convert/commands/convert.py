"""`sa-convert convert`: the main job."""

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


@click.command("convert")
@model_argument
@click.option("--recipe", "recipe_name", required=True, metavar="NAME-or-FILE", help="A shipped recipe or a YAML file.")
@click.option(
    "--for",
    "engine",
    type=click.Choice(["transformers", "vllm"]),
    help="What the result is to run in. transformers (default): it carries its code. vllm: vLLM's own "
    "classes run it, and it has only what these save memory with. Default: the recipe's.",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder to make.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show the plan and the savings, and write nothing. If the recipe asks for a search, it runs.",
)
@click.option(
    "--calibration",
    metavar="TEXT",
    help="Text: builtin, a .txt, .md or .jsonl file, or hub:DATASET[:CONFIG[:SPLIT]]. One part calibrates, another "
    "validates. Default: the recipe's.",
)
@click.option(
    "--max-perplexity-increase",
    type=PERCENT,
    metavar="PERCENT",
    help="The gate, for example 5%. Default: the recipe's.",
)
@click.option(
    "--no-validate",
    "validate",
    is_flag=True,
    callback=lambda context, option, given: not given,
    help="Do not run the models. The report then claims no quality.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier result at DIR.")
@dtype_option("the models are run (auto: as stored), and of weights read from a .gguf file")
@device_option
@click.option(
    "--layer-by-layer",
    is_flag=True,
    help="Keep one layer's weights in memory at a time. Without it, that is done if the model does not fit.",
)
@click.option("--push-to", metavar="REPO_ID", help="Upload the result to the Hub, after it is validated (see push).")
@click.option("--private", is_flag=True, help="With --push-to: make the repository private.")
@trust_option
@json_option
def command(
    model: str,
    recipe_name: str,
    output: Path,
    dry_run: bool,
    engine: str | None,
    max_perplexity_increase: float | None,
    push_to: str | None,
    private: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert MODEL by a recipe into the folder DIR.

    What the recipe takes from the model is deleted. The result is run and compared with MODEL. DIR appears complete or
    not at all. If the result is worse than the gate allows, the exit status is 3 and there is no DIR.

    DIR loads with AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True), and with --for vllm without
    trusting any code.

    \b
    Examples:
      sa-convert convert ./Llama-3-8B --recipe balanced -o ./Llama-3-8B-shared
      sa-convert convert org/Llama-3-8B@main --recipe balanced -o ./Llama-3-8B-shared
      sa-convert convert model.gguf --recipe my.yaml -o out --max-perplexity-increase 3%
      sa-convert convert ./model --recipe late-span -o out --dry-run
      sa-convert convert org/Llama-3-8B --recipe balanced -o out --push-to me/Llama-3-8B-shared
      accelerate launch --multi_gpu --num_processes 8 -m sa_convert convert ./Llama-3-70B --recipe balanced -o out
    """
    from dataclasses import asdict

    from sa_convert.jobs.converting import ConvertOptions, convert, plan
    from sa_convert.models.processes import first, launched
    from sa_convert.plan.recipe_file import load_recipe
    from sa_convert.present.terminal.plan_text import plan_json, render_plan

    how = ConvertOptions(**options)
    if private and push_to is None:
        raise click.UsageError("--private goes with --push-to.")
    if push_to is not None and not how.validate:
        raise click.UsageError("--push-to uploads what is validated only, so it does not go with --no-validate.")
    if push_to is not None and how.trust:
        raise click.UsageError(
            "--push-to does not go with --trust-remote-code: look at the result, which may carry code, then push it."
        )
    with launched():
        recipe = load_recipe(recipe_name)
        if engine is not None:
            recipe = recipe.with_engine(engine)
        if max_perplexity_increase is not None:
            recipe = recipe.with_gate(max_perplexity_increase)

        if dry_run:
            conversion = plan(model, recipe, how)
            if as_json:
                echo_json(plan_json(conversion))
            else:
                click.echo(render_plan(conversion))
            return
        target = None
        if push_to is not None and first():
            from sa_convert.present.hub.target import check_target

            target = check_target(push_to, private)
        # The name of a file, not its path: the report holds nothing of this machine.
        report = convert(model, recipe, output, how, Path(recipe_name).name)
        if report is None:  # another process tells
            return
        if not as_json:
            from sa_convert.present.terminal.report_text import render_report

            click.echo(render_report(report))
            click.echo(f"\nWritten to {output}")
        pushed = None
        if target is not None:
            from sa_convert.jobs.pushing import push_converted

            pushed = push_converted(output, target)
        if as_json:
            echo_json({**report.to_json(), **({"pushed": asdict(pushed)} if pushed else {})})
        elif pushed:
            click.echo(f"Uploaded to {pushed.url}")
