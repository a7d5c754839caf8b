"""Needles in long text: code words, planted at several depths of a real text, are asked for at its end.

    ... text ... The code of Amber is <four random tokens>. ... text ... The code of Jonas is <four>. ... text ...
    The code of Jonas is <four>. The code of Amber is <four>.

The loss of the four tokens at the end tells whether a model finds them. Nothing is generated and no chat template is
used, so that base models, and models of any tokenizer, are asked the same. Each name occurs once before it is asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sa_convert.domain.long_context import NeedleLosses
from sa_convert.domain.losses import Losses
from sa_convert.measure.quality.long_text import token_losses

NAMES = ("Amber", "Jonas", "Clara", "Victor", "Irene")
STATEMENT = ("\nThe code of {} is", ".\n")
"""What comes before a code word, and after it."""

CODE = 4
"""Random tokens of a code word."""

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
ROWS = 8
MOST = 0.5
"""Of a sequence, the most that statements and questions may take."""


@dataclass(frozen=True)
class Needles:
    """tokens: (N, L). depths: K. places: (N, K, CODE), where the code word that was planted at this depth is asked for:
    the places of its tokens in the sequence."""

    tokens: torch.Tensor
    depths: tuple[float, ...]
    places: torch.Tensor

    def losses(self, model: Any, description: str = "needle") -> tuple[NeedleLosses, ...]:
        """By depth, the mean loss of the tokens of each row's code word, in nats."""
        first = int(self.places.min())
        losses = token_losses(model, self.tokens, description, last=self.tokens.shape[1] - first)
        found = losses.gather(1, self.places.flatten(1) - first).view(self.places.shape).mean(dim=2)
        return tuple(
            NeedleLosses(depth, Losses(tuple(column.tolist())))
            for depth, column in zip(self.depths, found.T, strict=True)
        )


def needles(
    tokenizer: Any, text: torch.Tensor, vocabulary: Sequence[int], seed: int = 0, start: Sequence[int] = ()
) -> Needles | None:
    """Needles in sequences as long as those of `text` (N, L), which serve in turn, or None if they are too short.

    vocabulary: tokens to draw code words from. start: tokens at the beginning of each sequence of the text, which stay
    there. The same arguments give the same needles. Fewer depths are taken if all of them would fill more than MOST.
    """
    length = text.shape[1]
    parts = {name: [_tokens(tokenizer, part.format(name)) for part in STATEMENT] for name in NAMES}
    longest = max(len(before) + CODE + len(after) for before, after in parts.values())
    kept = min(len(DEPTHS), int(MOST * length) // (2 * longest))
    if kept == 0:
        return None
    depths = DEPTHS if kept == len(DEPTHS) else tuple((2 * number + 1) / (2 * kept) for number in range(kept))
    generator = torch.Generator().manual_seed(seed)
    ordinary = torch.tensor(vocabulary, dtype=torch.long)
    rows, places = [], []
    for number in range(ROWS):
        names = [NAMES[at] for at in torch.randperm(len(NAMES), generator=generator)[: len(depths)].tolist()]
        drawn = torch.randint(len(ordinary), (len(depths), CODE), generator=generator)
        codes = [ordinary[row].tolist() for row in drawn]
        said = [[*parts[name][0], *code, *parts[name][1]] for name, code in zip(names, codes, strict=True)]
        order = torch.randperm(len(depths), generator=generator).tolist()
        # No row of the text serves twice with the same words at the same places.
        filler = text[number % len(text), len(start) :].roll(-(number // len(text)) * CODE).tolist()
        row, asked = _row(list(start), filler, depths, said, order, length)
        rows.append(row)
        opening = [len(parts[name][0]) for name in names]
        places.append([[asked[at] + opening[at] + token for token in range(CODE)] for at in range(len(depths))])
    return Needles(torch.tensor(rows), depths, torch.tensor(places))


def _row(
    start: list[int], filler: list[int], depths: Sequence[float], said: list[list[int]], order: list[int], length: int
) -> tuple[list[int], dict[int, int]]:
    """A sequence of `length` tokens, and where each statement begins that is said once more at its end."""
    room = length - len(start) - 2 * sum(map(len, said))
    row, used = list(start), 0
    for depth, statement in zip(depths, said, strict=True):
        stop = round(depth * room)
        row += filler[used:stop] + statement
        used = stop
    row += filler[used:room]
    asked = {}
    for at in order:
        asked[at] = len(row)
        row += said[at]
    return row, asked


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
