"""A model folder with safetensors weights, read from config.json, the index and the headers alone."""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sa_convert.domain.checkpoint import Checkpoint, Shard
from sa_convert.errors import CheckpointError, UnsupportedModelError
from sa_convert.read.characters import check_characters
from sa_convert.read.header import read_shard
from sa_convert.read.index_check import agree
from sa_convert.read.inside import check_inside, leads_out, real_folder, revision_of
from sa_convert.read.kinds import other_kind
from sa_convert.read.side_files import code_files, side_files

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CARD = "README.md"


def open_folder(folder: Path, identity: str | None = None, revision: str | None = None) -> Checkpoint:
    """The checkpoint in a folder. identity: what the user called it, the path itself by default.

    Raises CheckpointError if files are missing, damaged or contradict each other.
    """
    root = real_folder(folder)
    config = read_config(folder)
    refuse_adapter(folder)
    if os.path.lexists(folder / CARD):  # the new model card quotes it
        check_inside(folder / CARD, root, "the model card")
    index: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    if os.path.lexists(folder / SINGLE):  # transformers, too, looks for the single file first
        check_inside(folder / SINGLE, root, "the file of weights")
        shards: tuple[Shard, ...] = (read_shard(folder / SINGLE),)
    elif os.path.lexists(folder / INDEX):
        check_inside(folder / INDEX, root, "the index")
        index = read_json(folder / INDEX)
        shards, index, notes = _indexed_shards(folder, root, config, index)
    else:
        other = next(iter(sorted(folder.glob("*.safetensors"))), None)
        found = f"; {other.name} is there, but no index names it" if other else ""
        raise CheckpointError(
            f"{folder}: has a config.json but no weights ({SINGLE} or {INDEX}){found}; download the model whole."
        )
    return Checkpoint(
        identity=str(folder) if identity is None else identity,
        folder=folder,
        config=config,
        shards=shards,
        index=index,
        side_files=side_files(root),
        revision=revision or revision_of(root),
        code=code_files(root),
        notes=notes,
    )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder. Raises CheckpointError if it is missing or no JSON object."""
    file = folder / "config.json"
    if not os.path.lexists(file):
        empty = next(folder.iterdir(), None) is None
        why = "is an empty folder" if empty else "has no config.json"
        raise CheckpointError(f"{folder}: {why}; give the folder of a model in the format of transformers.")
    check_inside(file, folder.resolve(), "the configuration")
    return read_json(file)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError naming the file, and the line if it is not JSON."""
    try:
        data = file.read_bytes()
        text = data.decode("utf-8")
        content = json.loads(text)
        check_characters(text, content)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}.") from error
    except UnicodeEncodeError:
        raise CheckpointError(f"{file}: holds half of a character, which is no text; mend it.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: {_no_json(data, error)}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds no JSON object; take the file from the model's author.")
    return content


def _no_json(data: bytes, error: Exception) -> str:
    """Why a file is not JSON, and what to do."""
    if (kind := other_kind(data)) is not None:
        return kind
    if not isinstance(error, json.JSONDecodeError):
        return "is not JSON; take the file from the model's author"
    cut = error.pos >= len(error.doc.rstrip())
    return f"is not JSON (line {error.lineno}: {error.msg}); " + ("it is cut; download it again" if cut else "mend it")


def refuse_adapter(folder: Path, files: Collection[str] = ()) -> None:
    """Raises UnsupportedModelError for a folder with a PEFT adapter: transformers would load it on top of the weights,
    and a conversion of the weights alone would lose it. files: what the folder will also have."""
    if "adapter_config.json" in files or (folder / "adapter_config.json").exists():
        raise UnsupportedModelError(
            f"{folder}: holds a PEFT adapter (adapter_config.json); merge it into the model first "
            "(merge_and_unload of PEFT), then convert the merged model."
        )


def weight_map(file: Path, index: Mapping[str, Any]) -> dict[str, str]:
    """Tensor names and the files that hold them, from an index. Raises CheckpointError for files elsewhere."""
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{file}: has no 'weight_map' of tensors and files; save the model again.")
    for tensor, name in names.items():
        if not isinstance(name, str) or not name:
            raise CheckpointError(f"{file}: names no file for tensor '{tensor}'; save the model again.")
        if leads_out(name):
            raise CheckpointError(
                f"{file}: tensor '{tensor}' lies in '{name}', outside of the model's folder; do not trust this model."
            )
    return names


def _indexed_shards(
    folder: Path, root: Path, config: Mapping[str, Any], index: Mapping[str, Any]
) -> tuple[tuple[Shard, ...], dict[str, Any], tuple[str, ...]]:
    """The shards in the order of their names, the index in agreement with them, and what is passed over."""
    file = folder / INDEX
    names = weight_map(file, index)
    shards = {}
    for name in sorted(set(names.values())):
        tensor = next(key for key, value in names.items() if value == name)
        check_inside(folder / name, root, f"the shard that {INDEX} names for tensor '{tensor}'")
        shards[name] = read_shard(folder / name)
    return agreed_shards(shards, names, config, index, file, [path.name for path in folder.glob("*.safetensors")])


def agreed_shards(
    shards: Mapping[str, Shard],
    names: Mapping[str, str],
    config: Mapping[str, Any],
    index: Mapping[str, Any],
    file: Path,
    present: Collection[str],
) -> tuple[tuple[Shard, ...], dict[str, Any], tuple[str, ...]]:
    """What is taken of the shards (by their names, in order), the index that says so, and what is passed over.

    names: the file of each tensor, as the index has it. file: of the index. present: names of files that may be
    weights, too. Raises CheckpointError, see `agree`.
    """
    held = {name: [entry.name for entry in shard.tensors] for name, shard in shards.items()}
    agreement = agree(held, names, config, file)
    taken = (agreement.taken(shard, name) for name, shard in shards.items())
    notes = (*agreement.notes, *_beside(present, shards, file))
    return tuple(shard for shard in taken if shard.tensors), agreement.index(index), notes


def _beside(present: Collection[str], shards: Collection[str], index: Path) -> list[str]:
    """A note on weight files that no index names. Mistral's own format of the same weights goes without saying."""
    beside = sorted(
        name
        for name in present
        if name.endswith(".safetensors") and "/" not in name
        if name not in shards and not name.startswith("consolidated")
    )
    if not beside:
        return []
    files = f"{beside[0]} is" if len(beside) == 1 else f"{len(beside)} files, such as {beside[0]}, are"
    return [f"{files} not named by {index.name}; left out, as in transformers."]
