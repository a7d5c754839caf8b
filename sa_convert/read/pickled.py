"""Legacy PyTorch checkpoints (`pytorch_model*.bin`): read with weights_only, and written anew as safetensors."""

import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.errors import CheckpointError
from sa_convert.read.described import METADATA, described
from sa_convert.read.folder import (
    CARD,
    INDEX,
    open_folder,
    read_config,
    read_json,
    refuse_adapter,
    weight_map,
)
from sa_convert.read.index_check import agree
from sa_convert.read.inside import check_inside, real_folder, revision_of
from sa_convert.read.kinds import other_kind
from sa_convert.read.side_files import code_files, side_files

if TYPE_CHECKING:
    import torch

PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"


def has_pickled(folder: Path) -> bool:
    return os.path.lexists(folder / PICKLED) or os.path.lexists(folder / PICKLED_INDEX)


def open_pickled(folder: Path, workspace: Path | None, identity: str) -> Checkpoint:
    """The checkpoint in a folder with pickled weights. No code in them is ever run.

    workspace: where to write the same model as safetensors, one file for each of the base's, dtypes kept; None only
    describes the tensors, their byte ranges as such files would have them. Raises CheckpointError.
    """
    from sa_convert.console.progress import progress

    root = real_folder(folder)
    config = read_config(folder)
    refuse_adapter(folder)
    index, notes = None, tuple[str, ...]()
    names: Mapping[str, str] = {}
    if os.path.lexists(folder / PICKLED):
        files = [PICKLED]
    else:
        check_inside(folder / PICKLED_INDEX, root, "the index")
        index = read_json(folder / PICKLED_INDEX)
        names = weight_map(folder / PICKLED_INDEX, index)
        files = sorted(set(names.values()))
    for name in files:
        check_inside(folder / name, root, "the file of weights")
    if index is not None:
        agreement = agree({name: list(_load(folder / name)) for name in files}, names, config, folder / PICKLED_INDEX)
        index, names, notes = agreement.index(index), agreement.names, agreement.notes
        files = [name for name in files if name in names.values()]
    shards = []
    new_map: dict[str, str] = {}
    with progress(len(files), "Reading .bin files", unit="file", disable=workspace is None) as bar:
        for name in files:
            held = _load(folder / name)
            if index is not None:
                held = {key: tensor for key, tensor in held.items() if names.get(key) == name}
            state = _untied(held, config)
            if workspace is None:
                shards.append(described(folder / name, state))
            else:
                target = _safetensors_name(name)
                new_map.update(dict.fromkeys(state, target))
                _write(state, folder / name, workspace / target)
            bar.update()
    found = set(new_map) or {tensor.name for shard in shards for tensor in shard.tensors}
    if not found:
        raise CheckpointError(f"{folder}: its .bin files hold no tensors; save the model again.")
    if workspace is None:
        revision = revision_of(root)
        sides, code = side_files(root), code_files(root)
        return Checkpoint(identity, folder, config, tuple(shards), index, sides, revision, code, notes=notes)
    if index is not None:
        new_index = {**index, "weight_map": {key: new_map[key] for key in names if key in new_map}}
        (workspace / INDEX).write_text(json.dumps(new_index, indent=2) + "\n", encoding="utf-8")
    copied = [Path("config.json"), *side_files(root), *code_files(root)]
    if os.path.lexists(folder / CARD):  # no side file, but the new model card quotes it
        check_inside(folder / CARD, root, "the model card")
        copied.append(Path(CARD))
    for path in copied:
        (workspace / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / path, workspace / path)
    return open_folder(workspace, identity, revision_of(root))


def _load(file: Path) -> dict[str, "torch.Tensor"]:
    """The tensors of a .bin file, mapped into memory if the format allows. Raises CheckpointError."""
    import pickle

    import torch

    with file.open("rb") as stream:
        start = stream.read(32)
    if not zipfile.is_zipfile(file):
        if start.startswith(b"PK"):
            raise CheckpointError(f"{file}: is a PyTorch checkpoint that is cut; download it again.")
        if (kind := other_kind(start)) is not None:
            raise CheckpointError(f"{file}: {kind}.")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        if "Weights only load failed" not in str(error):
            raise CheckpointError(f"{file}: is not a PyTorch checkpoint; save the model again.") from None
        raise CheckpointError(
            f"{file}: holds more than weights, and loading the rest could run code, so it is not loaded; "
            "ask the author for safetensors."
        ) from None
    except Exception as error:  # torch raises whatever its readers do: RuntimeError, EOFError, KeyError, ...
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{file}: is not a PyTorch checkpoint that can be read ({reason}); save the model again."
        ) from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{file}: holds a {type(state).__name__} in place of named tensors; it is no model.")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise CheckpointError(
                f"{file}: '{name}' is no plain tensor but a {type(tensor).__name__}; "
                "give the state dict of a model alone."
            )
    return dict(state)


def _untied(state: dict[str, "torch.Tensor"], config: Mapping[str, Any]) -> dict[str, "torch.Tensor"]:
    """The tensors that are to be stored, no two of them in the same memory.

    Of tied tensors the first stays, as transformers does. If the model does not tie them, both do.
    """
    kept: dict[str, torch.Tensor] = {}
    views: dict[int, set[tuple[object, ...]]] = {}
    for name, tensor in state.items():
        memory = tensor.untyped_storage().data_ptr()
        view = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        known = views.setdefault(memory, set())
        if not memory or not known:
            kept[name] = tensor
        elif view not in known or not _ties(config):
            kept[name] = tensor.clone()
        known.add(view)
    return kept


def _ties(config: Mapping[str, Any]) -> bool:
    """Whether the model ties its embeddings, by config.json or else by the default of its type."""
    if "tie_word_embeddings" in config:
        return bool(config["tie_word_embeddings"])
    from transformers import AutoConfig

    try:
        return bool(getattr(AutoConfig.for_model(str(config.get("model_type"))), "tie_word_embeddings", True))
    except ValueError:  # a type that transformers does not know; the plan will say so
        return True


def _write(state: Mapping[str, "torch.Tensor"], base: Path, file: Path) -> None:
    from safetensors.torch import save_file

    described(base, state)  # for the error that names a dtype without safetensors counterpart
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous() for name, tensor in state.items()}, file, metadata=METADATA)


def _safetensors_name(name: str) -> str:
    """pytorch_model-00001-of-00002.bin: model-00001-of-00002.safetensors."""
    path = Path(name)
    return str(path.with_name(path.stem.replace("pytorch_model", "model", 1) + ".safetensors"))
