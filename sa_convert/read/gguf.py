"""Models in a .gguf file, dequantised through transformers and written as a folder with safetensors."""

import json
import re
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sa_convert.data.checkpoint import Checkpoint
from sa_convert.errors import CheckpointError, SaConvertError, UnsupportedModelError
from sa_convert.export.shared_attention_families import auto_class_of
from sa_convert.read.described import described_model
from sa_convert.read.family import family_of
from sa_convert.read.folder import open_folder

_SHARD_SIZE = "4GB"

_PART = re.compile(r".*-\d{5}-of-(\d{5})\.gguf")
"""The only names that llama.cpp gives to, and takes for, parts of a model."""


def open_gguf(file: Path, workspace: Path | None, identity: str, dtype: str = "float32") -> Checkpoint:
    """The model in a .gguf file.

    workspace: where to write it as a folder (weights in `dtype`, tokenizer, generation config); None only describes the
    tensors that would be written. Raises CheckpointError, UnsupportedModelError.
    """
    _check(file)
    try:
        config = _config(file)
        family_of(_as_dict(config))  # before minutes of dequantising
        if workspace is None:
            return _described(file, config, identity, dtype)
        workspace.mkdir(parents=True, exist_ok=True)
        _write(file, config, workspace, dtype)
    except (SaConvertError, MemoryError):
        raise
    except OSError as error:
        if error.errno is not None:  # such as a full disk
            raise
        raise _unreadable(file, error) from error
    except Exception as error:  # the readers of transformers raise whatever broken data makes of them
        raise _unreadable(file, error) from error
    return open_folder(workspace, identity)


def _check(file: Path) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file}: there is no such file.")
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise CheckpointError(f"{file}: is not a GGUF file, or damaged; download it again.")
    part = _PART.fullmatch(file.name)
    if part and int(part[1]) > 1:
        raise UnsupportedModelError(
            f"{file}: is one of {int(part[1])} parts of a model; join them with llama-gguf-split --merge."
        )
    if find_spec("gguf") is None:
        raise UnsupportedModelError(f"{file}: reading it needs one more package: pip install 'sa-convert[gguf]'")


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return CheckpointError(f"{file}: transformers cannot read this GGUF file ({reason}); download it again.")


def _config(file: Path) -> Any:
    """The transformers configuration that the file's metadata describe."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except ValueError as error:
        if "not supported" not in str(error):
            raise
        raise UnsupportedModelError(f"{file}: {str(error).splitlines()[0]}") from error
    # A dequantised model that still says it is quantised could not be saved.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _as_dict(config: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(config.to_json_string())
    return content


def _empty_model(config: Any, dtype: str) -> Any:
    """The model without memory for its weights."""
    import torch

    with torch.device("meta"):
        return _auto_class(config).from_config(config, dtype=getattr(torch, dtype))


def _auto_class(config: Any) -> Any:
    """That of the family's models: AutoModelForCausalLM, or of encoder-decoders AutoModelForSeq2SeqLM."""
    import transformers

    family = family_of(_as_dict(config))
    return getattr(transformers, str(auto_class_of(family, family.default_class)))


def _described(file: Path, config: Any, identity: str, dtype: str) -> Checkpoint:
    model = _empty_model(config, dtype)
    shard = described_model(file, model)
    content = _as_dict(config) | {"architectures": [type(model).__name__]}
    return Checkpoint(identity, file.parent, content, (shard,), None, ())


def _write(file: Path, config: Any, workspace: Path, dtype: str) -> None:
    import torch
    from transformers import AutoTokenizer

    result: Any = _auto_class(config).from_pretrained(
        file.parent,
        config=deepcopy(config),
        gguf_file=file.name,
        dtype=getattr(torch, dtype),
        output_loading_info=True,
    )
    loaded, told = result
    missing = sorted(told["missing_keys"])
    if missing:
        raise CheckpointError(f"{file}: has no tensor '{missing[0]}', which the model needs; download it again.")
    # A model that was loaded from quantised weights does not save itself; a fresh one with its tensors does.
    model = _empty_model(config, dtype)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(workspace, max_shard_size=_SHARD_SIZE)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(workspace)
