"""Names of layers if a model has several kinds of attention.

Inside of sa_convert all layers of a model are numbered through: first those of the encoder, then the decoder's own,
then its cross-attention. People, recipes and config.json name the stack (`encoder.3`, `decoder.3`, `decoder.cross.3`)
and count from 0 in each; a model with one kind of attention has plain numbers either way.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

Stacks = tuple[tuple[str, int], ...]
"""Name and number of layers of each stack, in the order in which layers are numbered; () if there is one kind."""


class InStack(NamedTuple):
    """A layer by the name of its stack ("" if there is one kind), and its number there."""

    stack: str
    number: int


def in_stack(stacks: Stacks, layer: int) -> InStack:
    """A layer as people name it."""
    number = layer
    for name, depth in stacks:
        if number < depth:
            return InStack(name, number)
        number -= depth
    return InStack("", layer)


def layer_label(stacks: Stacks, layer: int) -> str:
    stack, number = in_stack(stacks, layer)
    return f"{stack}.{number}" if stack else str(number)


def stack_ranges(stacks: Stacks, depth: int) -> list[tuple[str, range]]:
    """Name and layers of each stack; "" and all `depth` layers if there is one kind."""
    ranges, first = [], 0
    for name, layers in stacks or (("", depth),):
        ranges.append((name, range(first, first + layers)))
        first += layers
    return ranges


def layer_names(stacks: Stacks, layers: Iterable[int]) -> str:
    """Such as "1-29", "2, 4-6", "3-41 (every 2nd)" or "encoder.1-5, decoder.3"."""
    named = [in_stack(stacks, layer) for layer in layers]
    names = []
    for stack in dict.fromkeys(name for name, _ in named):
        runs = _runs([number for name, number in named if name == stack])
        names += [f"{stack}.{run}" if stack else run for run in runs]
    return ", ".join(names)


def _runs(numbers: Sequence[int]) -> list[str]:
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if step > 1 and len(numbers) > 3 and list(numbers) == list(range(numbers[0], numbers[-1] + 1, step)):
        return [f"{numbers[0]}-{numbers[-1]} (every {step}{ {2: 'nd', 3: 'rd'}.get(step, 'th') })"]
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return ["-".join(map(str, span)) for span in spans]


def layer_of(stacks: Stacks, stack: str, number: int) -> int:
    """The layer with this number in a stack. Raises ValueError if there is no such stack."""
    if not stacks and not stack:
        return number
    before = 0
    for name, depth in stacks:
        if name == stack:
            return before + number
        before += depth
    raise ValueError(f"the model has no stack '{stack}'" if stack else "the model has several stacks")


def parse_label(label: object) -> tuple[str, int]:
    """ "decoder.cross.3" -> ("decoder.cross", 3); "27" or 27 -> ("", 27). Raises ValueError."""
    stack, _, number = str(label).rpartition(".")
    return stack, int(number)
