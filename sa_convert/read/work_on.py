"""A model that is to be run or converted: described first, and complete once it is known that the work can be done."""

from dataclasses import replace
from pathlib import Path

from sa_convert.console.progress import announce, notes
from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.domain.model import Model, RunOptions
from sa_convert.read.model_of import model_of
from sa_convert.read.open_model import complete, open_model
from sa_convert.read.remote_code import allow_code


def describe(reference: str, run: RunOptions) -> Model:
    """What the user calls `reference`, from headers alone. What is to be said of it is told on stderr.

    Code of the model is not run, but refused here if it would have to be. Raises CheckpointError,
    UnsupportedModelError.
    """
    model = model_of(open_model(reference, None, run.stored_dtype))
    notes(model.checkpoint.identity, model.checkpoint.notes)
    return replace(model, checkpoint=allow_code(model.checkpoint, run.trust))


def with_weights(described: Model, reference: str, workspace: Path, run: RunOptions) -> Model:
    """The same with all weights at hand, as safetensors; what has to be written for that lies in `workspace`."""
    checkpoint = described.checkpoint
    if checkpoint.absent:
        announce(f"downloading what the cache lacks of {checkpoint.identity}")
    if not checkpoint.is_safetensors:
        announce("reading weights")
    made = complete(checkpoint, reference, workspace, run.stored_dtype)
    return described if made is checkpoint else model_of(made)


def source_of(described: Checkpoint, reference: str) -> Path:
    """The file or folder of a model, which must survive: of one on the Hub, that in the cache."""
    path = Path(reference).expanduser()
    return path if path.exists() else described.folder


def bytes_to_read(described: Checkpoint) -> int:
    """Bytes that `with_weights` writes at the most: a model in safetensors is read where it lies."""
    return 0 if described.is_safetensors else described.weight_bytes
