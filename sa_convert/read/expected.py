"""The tensors that a model must have by its config.json, where the files cannot tell."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from sa_convert.data.checkpoint import Shard
from sa_convert.errors import CheckpointError
from sa_convert.read.family import architecture_of, family_of
from sa_convert.read.pickled import described_model


def expected_shard(config: Mapping[str, Any], file: Path) -> Shard:
    """The tensors that transformers would save of a model with this config.json, as if all were in `file`.

    Raises UnsupportedModelError for a type that has no family, CheckpointError where transformers rejects the config.
    """
    name = architecture_of(config, family_of(config))
    import torch
    import transformers

    model_class: Any = getattr(transformers, name)
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), torch.float32)
    try:
        with torch.device("meta"):
            made = model_class.config_class.from_dict(deepcopy(dict(config)))
            model = model_class(made).to(dtype if isinstance(dtype, torch.dtype) else torch.float32)
    except Exception as error:  # whatever a model class finds wrong with the values
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{file.parent / 'config.json'}: transformers makes no model of it ({reason})."
        ) from error
    return described_model(file, model)
