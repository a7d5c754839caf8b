"""An index of weights against what its files hold. The files decide, as they do in transformers.

transformers loads every tensor of every file that an index names, in the order of the files' names, and of two tensors
of one name the later one. It does not ask which tensors the index names. What the model lacks then is filled with
random numbers, and what it has no use for is passed over.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sa_convert.domain.checkpoint import Shard
from sa_convert.errors import CheckpointError
from sa_convert.read.expected import needed_tensors


@dataclass(frozen=True)
class IndexAgreement:
    """names: for each tensor that is taken the file that holds it, in the order of the index.

    notes: what of the index or of the files is left out, one sentence each.
    """

    names: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def index(self, index: Mapping[str, Any]) -> dict[str, Any]:
        """The index with these names."""
        return {**index, "weight_map": dict(self.names)}

    def taken(self, shard: Shard, file: str) -> Shard:
        """What is taken of a shard, which the index calls `file`."""
        return replace(shard, tensors=tuple(entry for entry in shard.tensors if self.names.get(entry.name) == file))


def agree(
    held: Mapping[str, Collection[str]], names: Mapping[str, str], config: Mapping[str, Any], index: Path
) -> IndexAgreement:
    """Which tensors are taken, and from which file.

    held: the tensors of each file, in the order of the files' names. names: the file of each tensor as the index has
    it. config: config.json; a model is made of it only if the two disagree. Raises CheckpointError if no file holds a
    tensor that the index names and the model needs.
    """
    found: dict[str, str] = {}
    twice: dict[str, str] = {}
    for file, tensors in held.items():
        for tensor in tensors:
            if tensor in found:
                twice[tensor] = file
            found[tensor] = file
    lacking = [name for name in names if name not in found]
    unnamed = [name for name in found if name not in names]
    notes = []
    if twice:
        first = next(iter(twice))
        notes.append(
            f"{_count(twice)} in more than one file ({_such(twice)}); taken from the last, {twice[first]}, as in "
            "transformers."
        )
    if lacking or unnamed:
        needed = needed_tensors(config, index)
        if needed is not None:
            _refuse_lacking(lacking, names, needed, found, index)
        if lacking:
            notes.append(f"{_count(lacking)} named by {index.name}, but in no file ({_such(lacking)}); left out.")
        # Names that the model does not have may be its own, spelt as transformers spelt them earlier, unless all of the
        # model's are there.
        if needed is not None and needed <= set(found):
            left = [name for name in unnamed if name not in needed]
            if left:
                notes.append(
                    f"{_count(left)} neither named by {index.name} nor known to the model ({_such(left)}); left out."
                )
            unnamed = [name for name in unnamed if name in needed]
        if unnamed:
            notes.append(f"{_count(unnamed)} not named by {index.name} ({_such(unnamed)}); taken, as in transformers.")
    taken = {name: found[name] for name in names if name in found}
    return IndexAgreement(taken | {name: found[name] for name in unnamed}, tuple(notes))


def _refuse_lacking(
    lacking: Collection[str], names: Mapping[str, str], needed: Collection[str], found: Collection[str], index: Path
) -> None:
    """Raises CheckpointError for the first tensor that only the index has, though the model cannot do without it."""
    name = next((name for name in lacking if name in needed), None)
    if name is None and any(tensor not in found for tensor in needed):
        name = next(iter(lacking), None)  # it may be the missing one, by an earlier name
    if name is not None:
        raise CheckpointError(
            f"{index}: places tensor '{name}' in {names[name]}, but no file of the model holds it, and the model needs "
            "it: take the index and all of its files from one and the same revision."
        )


def _count(names: Collection[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _such(names: Collection[str]) -> str:
    first = next(iter(names))
    return f"'{first}'" if len(names) == 1 else f"such as '{first}'"
