"""Models in a .gguf file, dequantised through transformers and written as a folder with safetensors."""

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sa_convert.console.progress import note
from sa_convert.domain.checkpoint import Checkpoint, Shard
from sa_convert.errors import CheckpointError, SaConvertError, UnsupportedModelError
from sa_convert.families.model_classes import auto_class_of
from sa_convert.read.described import described_model
from sa_convert.read.family_of import family_of
from sa_convert.read.folder import open_folder
from sa_convert.read.gguf_config import architecture_of, config_of
from sa_convert.read.gguf_header import FOLDER, REMAKE, GgufHeader, read_gguf_header
from sa_convert.read.gguf_tensors import Account, account_of, shard_of

_SHARD_SIZE = "4GB"

_PART = re.compile(r".*-\d{5}-of-(\d{5})\.gguf")
"""The only names that llama.cpp gives to, and takes for, parts of a model."""

_VOCABULARY = "tokenizer.ggml.tokens"


def open_gguf(file: Path, workspace: Path | None, identity: str, dtype: str = "float32") -> Checkpoint:
    """The model in a .gguf file.

    workspace: where to write it as a folder (weights in `dtype`, tokenizer, generation config); None only describes the
    tensors that would be written, for which neither the tokenizer nor tensors are read. Raises CheckpointError,
    UnsupportedModelError.
    """
    _check(file)
    header = read_gguf_header(file)
    entry, config = architecture_of(header), config_of(header)
    family = family_of(config)
    account = account_of(header, entry, config)
    if workspace is None:
        shard = shard_of(header, entry, account, dtype)
        return Checkpoint(identity, file.parent, config | {"architectures": [family.default_class]}, (shard,), None, ())
    _check_tokenizer(header)
    _tell(header, account)
    try:
        workspace.mkdir(parents=True, exist_ok=True)
        _write(header, account, config, workspace, dtype)
    except (SaConvertError, MemoryError):
        raise
    except OSError as error:
        if error.errno is not None:  # such as a full disk
            raise
        raise _unreadable(file, error) from error
    except Exception as error:  # the readers of transformers raise whatever broken data makes of them
        raise _unreadable(file, error) from error
    return _written(header, account, workspace, identity)


def _check(file: Path) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file}: there is no such file.")
    part = _PART.fullmatch(file.name)
    if part and int(part[1]) > 1:
        raise UnsupportedModelError(
            f"{file}: is one of {int(part[1])} parts of a model; join them with llama-gguf-split --merge."
        )
    if find_spec("gguf") is None:
        raise UnsupportedModelError(f"{file}: reading it needs one more package: pip install 'sa-convert[gguf]'")


def _check_tokenizer(header: GgufHeader) -> None:
    if header.metadata.get("tokenizer.ggml.model") in (None, "none", "no_vocab") or not header.metadata.get(
        _VOCABULARY
    ):
        raise CheckpointError(
            f"{header.file}: holds no tokenizer ('{_VOCABULARY}'), which a converted model needs; use a file with one, "
            f"or {FOLDER}."
        )


def _tokenizer(header: GgufHeader) -> Any:
    """Raises UnsupportedModelError for one that transformers has no reader for."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(header.file.parent, gguf_file=header.file.name)
    except MemoryError:
        raise
    except Exception as error:  # whatever its readers do with what they do not know
        kind = header.metadata["tokenizer.ggml.model"]
        raise UnsupportedModelError(
            f"{header.file}: transformers cannot read its tokenizer (tokenizer.ggml.model is {kind!r}: "
            f"{_reason(error)}); {FOLDER}."
        ) from error


def _tell(header: GgufHeader, account: Account) -> None:
    reasons: dict[str, list[str]] = {}
    for name, reason in account.left_out.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        note(f"{header.file}: '{names[0]}'{others} is left out: {reason}.")


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file}: transformers cannot read this GGUF file ({_reason(error)}); {FOLDER}.")


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _auto_class(config: Mapping[str, Any]) -> Any:
    """That of the family's models: AutoModelForCausalLM, or of encoder-decoders AutoModelForSeq2SeqLM."""
    import transformers

    family = family_of(config)
    return getattr(transformers, str(auto_class_of(family, family.default_class)))


def _write(header: GgufHeader, account: Account, config: Mapping[str, Any], workspace: Path, dtype: str) -> None:
    import torch
    from transformers import AutoConfig, GgufConfig

    file, number_type = header.file, getattr(torch, dtype)
    tokenizer = _tokenizer(header)  # before minutes of dequantising
    with torch.device("meta"):
        model = _auto_class(config).from_config(AutoConfig.for_model(**config), dtype=number_type)
    _compare(header, account, described_model(file, model))
    result: Any = _auto_class(config).from_pretrained(
        file.parent,
        config=AutoConfig.for_model(**config),
        gguf_file=file.name,
        dtype=number_type,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    loaded, told = result
    state = loaded.state_dict()
    for name in sorted(told["missing_keys"]):
        if name not in account.zeros:
            raise UnsupportedModelError(
                f"{file}: transformers does not read '{account.sources.get(name, name)}' of GGUF files of the "
                f"architecture '{header.architecture}'; {FOLDER}."
            )
        state[name] = torch.zeros_like(state[name])
    # A model that was loaded from quantised weights does not save itself; a fresh one with its tensors does.
    model.load_state_dict(state, assign=True)
    if "output.weight" not in account.sources.values():
        model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(workspace, max_shard_size=_SHARD_SIZE)
    tokenizer.save_pretrained(workspace)


def _compare(header: GgufHeader, account: Account, model: Shard) -> None:
    """Raises CheckpointError for a tensor that the model must have by its config, and that the file lacks or has in
    another shape."""
    for tensor in model.tensors:
        name, held = tensor.name, account.held.get(tensor.name)
        if held is None:
            raise CheckpointError(f"{header.file}: has no tensor for '{name}', which the model needs; {REMAKE}.")
        if held != tensor.shape:
            raise CheckpointError(
                f"{header.file}: '{account.sources.get(name, name)}' is of shape {list(held)}, but by the metadata of "
                f"shape {list(tensor.shape)}; {REMAKE}."
            )


def _written(header: GgufHeader, account: Account, workspace: Path, identity: str) -> Checkpoint:
    """The folder, which must hold what the account says, no less and no more."""
    written = open_folder(workspace, identity)
    expected = account.held
    found = {name: tensor.shape for name, tensor in written.tensors.items()}
    if written.config["model_type"] == "t5" and "lm_head.weight" not in found:
        expected.pop("lm_head.weight", None)  # the same as the embedding, which transformers then stores once
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise UnsupportedModelError(
            f"{header.file}: transformers made {list(found.get(name, ()))} numbers of '{name}', and the file holds "
            f"{list(expected.get(name, ()))}; {FOLDER}."
        )
    return written
