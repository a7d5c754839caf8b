"""A base model, opened to be calibrated: run, observed, and changed in memory for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from sa_convert.domain.calibrated import Measure
from sa_convert.domain.model import Model, RunOptions
from sa_convert.domain.units import Units
from sa_convert.errors import DataError
from sa_convert.models.load import load_base, load_tokenizer
from sa_convert.models.placement import Placement, placed_in_launch, positions
from sa_convert.models.processes import from_first
from sa_convert.models.task import NEXT_TOKEN, task_of
from sa_convert.observe.long_sequences import LENGTH, SHORTEST, LongSet, long_set
from sa_convert.observe.probe import Probe
from sa_convert.observe.sequences import CalibrationSet, calibration_set
from sa_convert.texts.text import load_text
from sa_convert.treatments.base import Treatment
from sa_convert.treatments.registry import searched

if TYPE_CHECKING:
    from sa_convert.domain.recipe import Calibration


WRITTEN_PART = 3
"""One sequence in so many is written by the model, if the text is built-in and the model fits in memory."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """probe: around the base model. samples: what is learned from and judged on. measure: how costs are measured.

    long: long sequences, if the search needs them, and the model and its task have them.
    streamed: the model does not fit in memory, so its weights come from the disk layer by layer.
    """

    model: Model
    units: Units
    probe: Probe
    tokenizer: Any
    samples: CalibrationSet
    measure: Measure
    placement: Placement
    seed: int
    treatments: tuple[Treatment, ...]
    long: LongSet | None = None

    @property
    def streamed(self) -> bool:
        return self.placement.max_memory is not None


@contextmanager
def open_session(
    model: Model,
    calibration: "Calibration",
    run: RunOptions | None = None,
    seed: int = 0,
    treatments: tuple[Treatment, ...] | None = None,
    at: int | None = None,
) -> Iterator[Session]:
    """Load the base model in the checkpoint's folder (safetensors or .bin) and make the calibration set.

    at: tokens at which the cache counts; long sequences are made if there is such a length.
    Raises DataError (text, tokenizer, no language-modelling head) and CheckpointError (model).
    """
    if calibration.sequences < 2:
        raise DataError("Calibration needs at least 2 sequences, of which one is held out: write more in the recipe.")
    folder, run = model.checkpoint.folder, run or RunOptions()
    tokenizer = load_tokenizer(folder)
    task = task_of(model.checkpoint.config, tokenizer, f"The model in {folder}")
    text = load_text(calibration.text)
    placement = placed_in_launch(folder, run)
    most = positions(model.checkpoint.config) or max(calibration.length, at or 0)
    length = min(calibration.length, most)
    with load_base(folder, placement) as loaded:
        embeddings = loaded.model.get_input_embeddings().weight.shape[0]
        written = None
        own = calibration.sequences // WRITTEN_PART
        if own and task is NEXT_TOKEN and calibration.text == "builtin" and placement.max_memory is None:
            from sa_convert.observe.written import written_by

            written = from_first(partial(written_by, loaded.model, tokenizer, own, length, seed))
        samples = calibration_set(
            tokenizer, embeddings, text, calibration.sequences, length, seed=seed, written=written, task=task
        )
        far = min(at or 0, most, LENGTH)
        long = None
        if far >= SHORTEST and task is NEXT_TOKEN:
            long = long_set(tokenizer, embeddings, text, far, seed)
        yield Session(
            model=model,
            units=Units(model.geometry),
            probe=Probe(loaded.model, model.family),
            tokenizer=tokenizer,
            samples=samples,
            measure="fisher" if placement.max_memory is None else "output error",
            placement=placement,
            seed=seed,
            treatments=searched() if treatments is None else treatments,
            long=long,
        )
