"""Code that a model brings along, and whether it may run.

If a type of model has a family, its configuration and model classes are those of transformers, always: what is
converted is what these compute. Code of the model's own can only be that of its tokenizer.
"""

from collections.abc import Iterator
from dataclasses import replace

from sa_convert.console.progress import announce
from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.errors import CheckpointError, UnsupportedModelError
from sa_convert.read.hub_download import side_json
from sa_convert.read.side_files import CUSTOM_GENERATE

TOKENIZER = "tokenizer_config.json"


def allow_code(checkpoint: Checkpoint, trust: bool) -> Checkpoint:
    """The checkpoint, trusted if it needs to be and the user says so; what code that is, is told on stderr.

    Raises UnsupportedModelError if it names code of its own and `trust` is not given, CheckpointError as
    `refuse_code_elsewhere`.
    """
    named = list(code_references(checkpoint))
    if not named:
        return checkpoint
    refuse_code_elsewhere(checkpoint)
    if not trust:
        file, reference = named[0]
        raise UnsupportedModelError(
            f"{checkpoint.identity}: {file} names code of the model's own ('{reference}' under auto_map), which is not "
            "run unasked, and may compute something else than transformers does for this type of model: "
            "look at the code, then use --trust-remote-code."
        )
    announce(f"trusting {shown_code(checkpoint)}")
    return replace(checkpoint, trusted=True)


def left_out(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What is to be said of code that a conversion leaves out, though the base would run it if it were trusted."""
    if not any(path.parts[0] == CUSTOM_GENERATE for path in checkpoint.code):
        return ()
    return (
        f"{CUSTOM_GENERATE}/, code of the model's own for generate(), is left out: everyone who trusts the converted "
        "model would run it; look at it, and copy it into the converted folder if you want that.",
    )


def shown_code(checkpoint: Checkpoint) -> str:
    """The code by file names and revision, for the user to see."""
    files = ", ".join(path.as_posix() for path in checkpoint.code) or "no files"
    revision = f" at {checkpoint.revision}" if checkpoint.revision else ""
    return f"the code of {checkpoint.identity}{revision}: {files}"


def refuse_code_elsewhere(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError if the model names code of another repository, of which no revision is pinned, or code
    that is not in its folder."""
    for file, reference in code_references(checkpoint):
        module = reference.rpartition(".")[0]
        if "--" in reference:
            raise CheckpointError(
                f"{checkpoint.identity}: {file} names code of another repository ('{reference}' under auto_map), whose "
                "revision nothing pins, so it is never run: save the model with its code, or remove that key."
            )
        if f"{module}.py" not in {path.as_posix() for path in checkpoint.code}:
            raise CheckpointError(
                f"{checkpoint.identity}: {file} names code that the model lacks ('{reference}' under auto_map): "
                "put that file into its folder, or remove that key."
            )


def code_references(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """What `auto_map` names, such as "modeling_own.OwnModel", and the file that says so. Raises CheckpointError."""
    for file, config in (("config.json", checkpoint.config), (TOKENIZER, side_json(checkpoint, TOKENIZER))):
        named = config.get("auto_map")
        for value in named.values() if isinstance(named, dict) else [named]:
            for reference in value if isinstance(value, list) else [value]:
                if reference:
                    yield file, str(reference)
