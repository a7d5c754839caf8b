"""What `sa-convert push` does, and `convert` with --push-to: a complete conversion goes to the Hub, in one commit."""

from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from sa_convert.console.progress import tell
from sa_convert.errors import OutputError, SaConvertError
from sa_convert.present.hub.complete import complete_conversion
from sa_convert.present.hub.target import Target, check_target
from sa_convert.present.hub.upload import Pushed, upload


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """How to push."""

    private: bool = False
    """The repository must be private, and is made so."""

    revision: str | None = None
    """The branch, made if it is missing; None: main."""

    allow_unvalidated: bool = False
    """Push a folder of which nothing was measured."""


def push(folder: Path, repo_id: str, options: PushOptions) -> Pushed:
    """Upload the conversion in a folder to `repo_id`. Raises CheckpointError, OutputError, GateRefused."""
    # 1. The folder is just what `convert` left, and its gate has passed.
    conversion = complete_conversion(folder, options.allow_unvalidated)
    if conversion.left_out:
        names = ", ".join(path.as_posix() for path in conversion.left_out)
        tell(f"not uploaded, since no part of the conversion: {names}")

    # 2. The repository is one that may be written to, and holds nothing that would be lost.
    target = check_target(repo_id, options.private, options.revision)

    # 3. One commit. What has arrived in an earlier try is not sent again.
    return upload(conversion, target)


def push_converted(folder: Path, target: Target) -> Pushed:
    """Upload what was just converted. Raises OutputError, which says that the folder stays and how to push it later."""
    try:
        return upload(complete_conversion(folder), target)
    except SaConvertError as error:
        private = " --private" if target.private else ""
        raise OutputError(
            f"{error} The conversion itself is complete: sa-convert push {quote(str(folder))} {target.repo_id}{private}"
        ) from error
