"""A base model, opened to be calibrated: run, observed, and changed in memory for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sa_convert.domain.calibrated import Measure
from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.domain.geometry import ModelGeometry
from sa_convert.domain.units import Units
from sa_convert.errors import DataError
from sa_convert.families.family import Family
from sa_convert.models.load import load_base, load_tokenizer
from sa_convert.models.placement import NO_MEMORY, Placement, place, positions
from sa_convert.models.task import NEXT_TOKEN, task_of
from sa_convert.observe.probe import Probe
from sa_convert.observe.sequences import CalibrationSet, calibration_set
from sa_convert.texts.text import load_text

if TYPE_CHECKING:
    from sa_convert.domain.recipe import Calibration


WRITTEN_PART = 3
"""One sequence in so many is written by the model, where the text is built-in and the model fits in memory."""


@dataclass(frozen=True)
class Session:
    """probe: around the base model. samples: what is learned from and judged on. measure: how costs are measured.

    streamed: the model does not fit in memory, so its weights come from the disk layer by layer.
    """

    checkpoint: Checkpoint
    family: Family
    units: Units
    probe: Probe
    tokenizer: Any
    samples: CalibrationSet
    measure: Measure
    placement: Placement
    seed: int

    @property
    def streamed(self) -> bool:
        return self.placement.max_memory is not None


@contextmanager
def open_session(
    checkpoint: Checkpoint,
    family: Family,
    geometry: ModelGeometry,
    calibration: "Calibration",
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    layer_by_layer: bool = False,
) -> Iterator[Session]:
    """Load the base model in `checkpoint.folder` (safetensors or .bin) and make the calibration set.

    device, dtype: see `sa_convert.models.placement.place`. layer_by_layer: keep one layer's weights in memory at a
    time even if all would fit. Raises DataError (text, tokenizer, no language-modelling head) and
    CheckpointError (model).
    """
    if calibration.sequences < 2:
        raise DataError("Calibration needs at least 2 sequences, of which one is held out: write more in the recipe.")
    tokenizer = load_tokenizer(checkpoint.folder)
    task = task_of(checkpoint.config, tokenizer, f"The model in {checkpoint.folder}")
    text = load_text(calibration.text)
    placement = place(checkpoint.folder, device, dtype, NO_MEMORY if layer_by_layer else None)
    length = min(calibration.length, positions(checkpoint.folder) or calibration.length)
    with load_base(checkpoint.folder, placement) as loaded:
        embeddings = loaded.model.get_input_embeddings().weight.shape[0]
        written = None
        own = calibration.sequences // WRITTEN_PART
        if own and task is NEXT_TOKEN and calibration.text == "builtin" and placement.max_memory is None:
            from sa_convert.observe.written import written_by

            written = written_by(loaded.model, tokenizer, own, length, seed)
        samples = calibration_set(tokenizer, embeddings, text, calibration.sequences, length, seed, written, task)
        probe = Probe(loaded.model, family)
        measure: Measure = "fisher" if placement.max_memory is None else "output error"
        yield Session(checkpoint, family, Units(geometry), probe, tokenizer, samples, measure, placement, seed)
