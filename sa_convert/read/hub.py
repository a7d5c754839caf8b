"""Models on the Hub, described without their weights: config.json, the index, and the headers of safetensors."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sa_convert.console.progress import note
from sa_convert.domain.checkpoint import Checkpoint, Shard
from sa_convert.errors import CheckpointError, UnsupportedModelError
from sa_convert.read.expected import expected_shard
from sa_convert.read.folder import (
    CARD,
    INDEX,
    SINGLE,
    agreed_shards,
    read_config,
    read_json,
    refuse_adapter,
    weight_map,
)
from sa_convert.read.header import read_shard
from sa_convert.read.hub_download import download_file
from sa_convert.read.hub_errors import hub_errors, not_cached, unreachable
from sa_convert.read.hub_headers import FIRST_BYTES, expected_header, remote_shards
from sa_convert.read.hub_names import HubName
from sa_convert.read.inside import check_inside, leads_out
from sa_convert.read.pickled import PICKLED, PICKLED_INDEX
from sa_convert.read.side_files import is_code, is_side_file


def open_hub(name: HubName) -> Checkpoint | None:
    """The checkpoint that a name on the Hub stands for, its revision resolved to a commit.

    config.json and an index are downloaded into the cache, of safetensors the headers are read alone, and nothing of
    what the cache holds already is asked for again. None: the Hub cannot be reached, but the cache has all the weights;
    `snapshot` tells where. Raises CheckpointError, UnsupportedModelError.
    """
    from huggingface_hub import hf_hub_download

    listed = _listing(name)
    if listed is None:
        _check_cached(name, snapshot(name))
        return None
    if "config.json" not in listed[1]:
        raise CheckpointError(f"{name}: {_without_config(name, listed[1])}")
    with hub_errors(name):  # asked for by the name of its branch, the cache knows the branch when there is no network
        folder = Path(hf_hub_download(name.repo, "config.json", revision=name.revision)).parent
    pinned = HubName(name.repo, folder.name)
    if folder.name != listed[0]:  # the branch has moved in between
        listed = _listing(pinned) or listed
    sizes = listed[1]
    config = read_config(folder)
    refuse_adapter(folder, sizes)
    index, names, files = None, dict[str, str](), [SINGLE]
    if SINGLE not in sizes:
        indices = [file for file in (INDEX, PICKLED, PICKLED_INDEX) if file in sizes]
        if not indices:
            raise CheckpointError(f"{name}: {_without_weights(sizes)}")
        files = indices[:1]
    if files[0].endswith(".json"):
        index = read_json(download_file(pinned, files[0]))
        names = weight_map(folder / files[0], index)
        absent = next((file for file in names.values() if file not in sizes), None)
        if absent is not None:
            raise CheckpointError(f"{name}: {files[0]} names '{absent}', which the Hub does not have.")
        files = sorted(set(names.values()))
    pickled = not (SINGLE in sizes or INDEX in sizes)
    notes: tuple[str, ...] = ()
    shards = _expected(name, folder, config) if pickled else _shards(pinned, folder, files, index)
    if index is not None and not pickled:
        found = dict(zip(files, shards, strict=True))
        shards, index, notes = agreed_shards(found, names, config, index, folder / INDEX, sizes)
    sides = sorted(path for path in map(Path, sizes) if is_side_file(path))
    code = sorted(path for path in map(Path, sizes) if is_code(path))
    needed = [*map(Path, files), *([Path(PICKLED_INDEX)] if pickled and index else []), *sides, *code, Path(CARD)]
    return Checkpoint(
        identity=name.repo,
        folder=folder,
        config=config,
        shards=shards,
        index=None if pickled else index,
        side_files=tuple(sides),
        revision=folder.name,
        code=tuple(code),
        absent={path: sizes[str(path)] for path in needed if str(path) in sizes and not os.path.exists(folder / path)},
        notes=notes,
    )


def snapshot(name: HubName) -> Path:
    """The folder in the cache for this revision; the folder's name is the commit. Raises CheckpointError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with hub_errors(name):
        try:
            file = hf_hub_download(name.repo, "config.json", revision=name.revision, local_files_only=True)
        except LocalEntryNotFoundError:
            raise CheckpointError(f"{name}: {not_cached('there is no such folder, and the model is')}") from None
    return Path(file).parent


def _listing(name: HubName) -> tuple[str, dict[str, int]] | None:
    """The commit of a revision and the bytes of its files, or None if the Hub cannot be reached.

    Raises CheckpointError.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    wait = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with hub_errors(name):
        try:
            info = HfApi().model_info(name.repo, revision=name.revision, files_metadata=True, timeout=wait)
        except HfHubHTTPError:
            raise
        except (OfflineModeIsEnabled, HTTPError):
            return None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    for file in sizes:
        if leads_out(file):
            raise CheckpointError(f"{name}: its file '{file}' would lie outside of its folder; do not trust it.")
    return str(info.sha), sizes


def _shards(name: HubName, folder: Path, files: list[str], index: Mapping[str, Any] | None) -> tuple[Shard, ...]:
    """name: with a commit as its revision. Files in the cache are read there."""
    names: dict[str, str] = dict(index["weight_map"]) if index else {}
    held: dict[str, list[str]] = {}
    for tensor, file in names.items():
        held.setdefault(file, []).append(tensor)
    found: dict[str, Shard] = {}
    absent = {}
    for file in files:
        if (folder / file).exists():
            check_inside(folder / file, folder.resolve(), "the file of weights")
            found[file] = read_shard(folder / file)
        else:
            absent[file] = expected_header(held[file]) if index else FIRST_BYTES
    if absent:
        found |= remote_shards(name, folder, absent)
    return tuple(found[file] for file in files)


def _expected(name: HubName, folder: Path, config: dict[str, Any]) -> tuple[Shard, ...]:
    """For weights that have no headers to read. Nothing if the type of the model is unknown."""
    try:
        shard = expected_shard(config, folder / PICKLED)
    except UnsupportedModelError:
        return ()
    note(
        f"{name} has .bin files only, which have no headers that could be read without downloading them: tensors, data "
        "types and sizes are those that follow from config.json."
    )
    return (shard,)


def _check_cached(name: HubName, folder: Path) -> None:
    """Raises CheckpointError unless the snapshot has its weights."""
    files = next(([file] for file in (SINGLE, INDEX, PICKLED, PICKLED_INDEX) if (folder / file).exists()), [])
    if not files:
        raise CheckpointError(f"{name}: {not_cached('its weights are')}")
    if files[0].endswith(".json"):
        files = sorted(set(weight_map(folder / files[0], read_json(folder / files[0])).values()))
    missing = next((file for file in files if not os.path.exists(folder / file)), None)
    if missing is not None:
        raise CheckpointError(f"{name}: {not_cached(f'{missing} is')}")
    note(f"{name} is taken from the cache as it is, since {unreachable()}.")


def _without_config(name: HubName, sizes: Mapping[str, int]) -> str:
    gguf = next((file for file in sorted(sizes) if file.lower().endswith(".gguf")), None)
    if gguf is None:
        return "has no config.json; give a model in the format of transformers."
    return (
        "has no config.json but .gguf files; download one and give that file, such as with "
        f"'hf download {name.repo} {gguf} --local-dir .'."
    )


def _without_weights(sizes: Mapping[str, int]) -> str:
    other = next((file for file in sorted(sizes) if file.endswith(".safetensors")), None)
    found = f"; {other} is there, but no index names it" if other else ""
    return f"has a config.json but no weights that sa-convert reads ({SINGLE} or {INDEX}){found}."
