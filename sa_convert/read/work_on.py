"""A model that is to be run or converted: described first, and complete once it is known that the work can be done."""

from pathlib import Path

from sa_convert.console.progress import announce, notes
from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.domain.model import RunOptions
from sa_convert.read.open_model import complete, open_model
from sa_convert.read.remote_code import allow_code


def describe(reference: str, run: RunOptions) -> Checkpoint:
    """What the user calls `reference`, from headers alone. What is to be said of it is told on stderr.

    Code of the model is not run, but refused here if it would have to be. Raises CheckpointError,
    UnsupportedModelError.
    """
    described = open_model(reference, None, run.stored_dtype)
    notes(described.identity, described.notes)
    return allow_code(described, run.trust)


def with_weights(described: Checkpoint, reference: str, workspace: Path, run: RunOptions) -> Checkpoint:
    """The same with all weights at hand, as safetensors; what has to be written for that lies in `workspace`."""
    if described.absent:
        announce(f"downloading what the cache lacks of {described.identity}")
    if not described.is_safetensors:
        announce("reading weights")
    return complete(described, reference, workspace, run.stored_dtype)


def source_of(described: Checkpoint, reference: str) -> Path:
    """The file or folder of a model, which must survive: of one on the Hub, that in the cache."""
    path = Path(reference).expanduser()
    return path if path.exists() else described.folder


def bytes_to_read(described: Checkpoint) -> int:
    """Bytes that `with_weights` writes at the most: a model in safetensors is read where it lies."""
    return 0 if described.is_safetensors else described.weight_bytes
