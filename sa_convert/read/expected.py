"""The tensors that a model must have by its config.json, if the files cannot tell."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from sa_convert.domain.checkpoint import Shard
from sa_convert.errors import CheckpointError, UnsupportedModelError
from sa_convert.read.described import described_model
from sa_convert.read.family_of import architecture_of, family_of


def expected_shard(config: Mapping[str, Any], file: Path) -> Shard:
    """The tensors that transformers would save of a model with this config.json, as if all were in `file`.

    Raises UnsupportedModelError for a type that has no family, CheckpointError if transformers rejects the config.
    """
    return described_model(file, _model(config, architecture_of(config, family_of(config)), file))


def needed_tensors(config: Mapping[str, Any], file: Path) -> frozenset[str] | None:
    """The names of the tensors without which transformers would fill a part of the model with random numbers.

    file: any in the model's folder. None: transformers makes no model of this config.json without code of its own, so
    nobody knows.
    """
    import re

    try:
        name = _architecture(config)
        if name is None:
            return None
        model = _model(config, name, file)
    except CheckpointError:  # what is wrong with the config, the plan will say
        return None
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    names = (tensor.name for tensor in described_model(file, model).tensors)
    return frozenset(name for name in names if not any(pattern.search(name) for pattern in optional))


def _architecture(config: Mapping[str, Any]) -> str | None:
    """The model class, of a type that has no family, too, if transformers has it."""
    try:
        return architecture_of(config, family_of(config))
    except UnsupportedModelError:
        import transformers

        named = config.get("architectures")
        names = named if isinstance(named, list) else []
        return next((name for name in names if isinstance(name, str) and hasattr(transformers, name)), None)


def _model(config: Mapping[str, Any], name: str, file: Path) -> Any:
    """A model of this class without weights. Raises CheckpointError if transformers rejects the config."""
    import torch
    import transformers

    model_class: Any = getattr(transformers, name)
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), torch.float32)
    try:
        with torch.device("meta"):
            made = model_class.config_class.from_dict(deepcopy(dict(config)))
            return model_class(made).to(dtype if isinstance(dtype, torch.dtype) else torch.float32)
    except Exception as error:  # whatever a model class finds wrong with the values
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{file.parent / 'config.json'}: transformers makes no model of it ({reason})."
        ) from error
