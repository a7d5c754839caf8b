"""Where the first of several processes writes, for the jobs that share a search; the others write nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sa_convert.domain.model import Model, RunOptions
from sa_convert.models.processes import first, from_first
from sa_convert.output.staging import Stage, staging
from sa_convert.read.work_on import with_weights


@contextmanager
def first_stages(output: Path, overwrite: bool, needed_bytes: int, source: Path) -> Iterator[Stage | None]:
    """As `staging` in the first process; None in all others."""
    if not first():
        yield None
        return
    with staging(output, overwrite, needed_bytes, source) as stage:
        yield stage


def staged_weights(model: Model, reference: str, stage: Stage | None, run: RunOptions) -> Model:
    """As `with_weights`, which the first process alone calls; the others read what it has written."""

    def make() -> Model:
        assert stage is not None
        return with_weights(model, reference, stage.root / "workspace", run)

    return from_first(make)
