"""What healing trains on and is judged on: rows of text, fresh random repetition, and held-out rows of both.

No document is in both parts. Text of other kinds than the user's own always judges, too: narrow text overfits soon.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from sa_convert.domain.heal_settings import BOTH, REPEATED, HealSettings
from sa_convert.errors import DataError
from sa_convert.measure.quality.copying import copying_probes
from sa_convert.models.tokens import ordinary_tokens, start_tokens
from sa_convert.texts.text import Text, load_text

HELD_OUT_PART = 5
"""One document in so many is held out."""

HELD_OUT_TOKENS = 1024
"""Of each kind of text, about."""

DISTANCES = (32, 64, 128, 256, 512, 1024, 2048)
PROBES = 3
PROBE_SEED = 7_919

SHORTEST_PERIOD = 16


@dataclass(frozen=True)
class HeldOut:
    """text: tokens (rows, length) by kind. copying: probes (PROBES, start + 2 x distance) by distance. start: how many
    tokens come before any text."""

    text: Mapping[str, torch.Tensor]
    copying: Mapping[int, torch.Tensor]
    start: int


class HealingRows(Dataset):
    """Row by row what is trained on, the same whenever it is asked for. One row in REPEATED is random repetition.

    text: (N, length) tokens, in another order each time that all were read. A row is "tokens" (length) and "scored"
    (length), bool: the tokens whose prediction counts; and "row", its number in the text, or -1.
    """

    def __init__(self, text: torch.Tensor, vocabulary: list[int], start: list[int], rows: int, seed: int) -> None:
        self.text, self.rows, self.seed = text, rows, seed
        self.vocabulary, self.start = torch.tensor(vocabulary), torch.tensor(start, dtype=torch.long)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        batch, place = divmod(index, REPEATED)
        if place == REPEATED - 1:
            return self.repetition(batch)
        turn, number = divmod(batch * (REPEATED - 1) + place, len(self.text))
        order = torch.randperm(len(self.text), generator=_generator(self.seed, 0, turn))
        row = int(order[number])
        tokens = self.text[row]
        scored = torch.ones(len(tokens), dtype=torch.bool)
        scored[0] = False
        return {"tokens": tokens, "scored": scored, "row": torch.tensor(row)}

    def repetition(self, number: int) -> dict[str, torch.Tensor]:
        """A period of random tokens, said over and over: every other one is long. Predictions count from the second
        time on."""
        generator = _generator(self.seed, 1, number)
        length = self.text.shape[1]
        longest = max(2, (length - len(self.start)) // 2)
        least, most = (longest // 4, longest) if number % 2 else (SHORTEST_PERIOD, longest // 4)
        least, most = max(1, min(least, most)), max(1, most)
        part = float(torch.rand((), generator=generator))
        period = round(math.exp(math.log(least) + part * (math.log(most) - math.log(least))))
        once = self.vocabulary[torch.randint(len(self.vocabulary), (period,), generator=generator)]
        filled = length - len(self.start)
        tokens = torch.cat([self.start, once.repeat(-(-filled // period))[:filled]])
        scored = torch.arange(length) >= len(self.start) + period
        return {"tokens": tokens, "scored": scored, "row": torch.tensor(-1)}


def _generator(*numbers: int) -> torch.Generator:
    """Numbers to draw from; those of other arguments are others."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % (2**61 - 1)
    return torch.Generator().manual_seed(mixed)


@dataclass(frozen=True)
class HealingText:
    """name: of the text. rows: (N, length) tokens to train on. held_out: what judges."""

    name: str
    rows: torch.Tensor
    held_out: HeldOut
    vocabulary: list[int]
    start: list[int]

    def training(self, rows: int, seed: int) -> HealingRows:
        """So many rows."""
        return HealingRows(self.rows, self.vocabulary, self.start, rows, seed)


def healing_text(
    tokenizer: Any, embeddings: int, settings: HealSettings, written: torch.Tensor | None = None
) -> HealingText:
    """The text that the settings, which are resolved, name. embeddings: how many tokens the model has.

    written: (N, length) tokens that the base wrote, if the text is "written" or BOTH. Raises DataError if it is too
    short.
    """
    length = settings.length
    assert length is not None
    assert settings.text is not None
    start = start_tokens(tokenizer)
    builtin = load_text("builtin").split("calibration")
    own = settings.text in ("builtin", "written", BOTH)
    text = builtin if own else load_text(settings.text).split("calibration")
    name = text.name
    rows, judging = _divided(tokenizer, text, length, start)
    if not own:
        judging = {**_divided(tokenizer, builtin, length, start)[1], **judging}
    if written is not None:
        held = max(1, len(written) // HELD_OUT_PART)
        judging["written"] = written[:held][: _held_rows(length)]
        rows = torch.cat([rows, written[held:]]) if settings.text == BOTH else written[held:]
        name = f"{name} and written by the base" if settings.text == BOTH else "written by the base"
    if not len(rows) or not judging:
        raise DataError(f"Text {name}: too short to train on sequences of {length} tokens: give a longer one.")
    vocabulary = ordinary_tokens(tokenizer, embeddings)
    held_out = HeldOut(judging, _probes(vocabulary, start, length), len(start))
    return HealingText(name, rows, held_out, vocabulary, start)


def _divided(tokenizer: Any, text: Text, length: int, start: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Rows to train on, and rows that judge by kind of text; kinds that do not fill a row judge nothing."""
    kinds: dict[str, list[Any]] = {}
    for document in text.documents:
        kinds.setdefault(document.kind, []).append(document)
    training: set[int] = set()
    judging = {}
    for kind, documents in kinds.items():
        held = documents[HELD_OUT_PART - 1 :: HELD_OUT_PART] or documents[1:][-1:]
        training |= {id(document) for document in documents} - {id(document) for document in held}
        rows = _rows(tokenizer, held, length, start)[: _held_rows(length)]
        if len(rows):
            judging[kind] = rows
    return _rows(tokenizer, [one for one in text.documents if id(one) in training], length, start), judging


def _rows(tokenizer: Any, documents: list[Any], length: int, start: list[int]) -> torch.Tensor:
    """The documents one after another, cut into rows (N, length) that begin with `start`; the rest is left out."""
    tokens: list[int] = []
    for document in documents:
        tokens += tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
    width = length - len(start)
    count = len(tokens) // width
    rows = torch.tensor(tokens[: count * width], dtype=torch.long).view(count, width)
    return torch.cat([torch.tensor(start, dtype=torch.long).expand(count, -1), rows], dim=1)


def _held_rows(length: int) -> int:
    return max(1, HELD_OUT_TOKENS // length)


def _probes(vocabulary: list[int], start: list[int], length: int) -> dict[int, torch.Tensor]:
    most = (length - len(start)) // 2
    distances = [distance for distance in DISTANCES if distance <= most] or [most]
    return {
        distance: copying_probes(
            vocabulary,
            period=distance,
            length=len(start) + 2 * distance,
            probes=PROBES,
            seed=PROBE_SEED + distance,
            start=start,
        )
        for distance in distances
    }
