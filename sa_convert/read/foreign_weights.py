"""Weights that are there, but not as transformers loads them for this type of model, and what the user can do.

Quantised, with adapters beside them, saved from inside of a wrapper, or empty. transformers would fill the parts of the
model that it does not find with random numbers, and say so in a warning.
"""

from collections.abc import Mapping
from typing import Any

from sa_convert.domain.checkpoint import FLOATS, Checkpoint, TensorEntry
from sa_convert.errors import UnsupportedModelError

_ADAPTED = ("base_layer", "original_module", "modules_to_save")
"""Modules that PEFT puts around the ones that it adapts."""

_WRAPPERS = {
    "_orig_mod": "torch.compile (save its _orig_mod",
    "_fsdp_wrapped_module": "FSDP (save with a full state dict",
    "_checkpoint_wrapped_module": "activation checkpointing (save the module inside of it",
    "_forward_module": "Lightning (save the module inside of it",
    "module": "DistributedDataParallel or DeepSpeed (save its .module",
}
"""Modules around others, and what made them. "module" is looked for at the start of a name only."""

_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "auto-round": "AutoRound",
    "compressed-tensors": "compressed-tensors",
    "hqq": "HQQ",
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8 (FBGEMM)",
    "modelopt": "ModelOpt",
    "quanto": "Quanto",
    "torchao": "torchao",
    "mxfp4": "MXFP4",
    "eetq": "EETQ",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "spqr": "SpQR",
    "higgs": "HIGGS",
}
"""How `quant_method` in config.json reads in a sentence."""

_LOADS_PLAIN = ("fp8", "fbgemm_fp8", "mxfp4", "bitnet")
"""Methods with which transformers runs weights that are stored plain."""

_PARTS = {
    "g_idx": "GPTQ",
    "qzeros": "GPTQ or AWQ",
    "qweight": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "W_q": "HQQ",
    "absmax": "bitsandbytes",
    "SCB": "bitsandbytes",
    "weight_scale_inv": "FP8",
    "weight_scale": "FP8 or INT8",
    "weight_scale_2": "ModelOpt",
    "input_scale": "FP8",
    "_data": "Quanto",
    "codebooks": "AQLM",
    "weight_format": "bitsandbytes",
}
"""The last part of tensor names that only quantised modules have."""


def refuse_foreign_weights(checkpoint: Checkpoint) -> None:
    """Raises UnsupportedModelError for weights of which transformers would load a part at most, with the reason."""
    for name, tensor in checkpoint.tensors.items():
        parts = name.split(".")
        if any(part in _ADAPTED for part in parts):
            raise UnsupportedModelError(
                f"'{name}' belongs to a model with an unmerged adapter (LoRA, PEFT), of which transformers would load "
                "random weights: load it with PEFT, call merge_and_unload(), save that model, and convert it."
            )
        wrapper = next((part for part in parts if part in _WRAPPERS and (part != "module" or parts[0] == part)), None)
        if wrapper is not None:
            raise UnsupportedModelError(
                f"'{name}' has '{wrapper}.' in its name, from {_WRAPPERS[wrapper]}, or rename the tensors), without "
                "which transformers would not find it and take random weights."
            )
        if tensor.elements == 0 and parts[-1] == "weight":
            raise UnsupportedModelError(
                f"'{name}' is empty (shape {list(tensor.shape)}), as DeepSpeed ZeRO-3 saves weights that it does not "
                "gather: make whole ones with zero_to_fp32.py beside the training checkpoint, or save again with "
                "stage3_gather_16bit_weights_on_model_save, and convert those."
            )
    _refuse_leftover(checkpoint)


def quantised(checkpoint: Checkpoint, found: str) -> UnsupportedModelError:
    """The error for a projection that is stored quantised. found: a tensor of it."""
    method = _method(checkpoint.config.get("quantization_config"))
    last = found.rpartition(".")[2]
    name = _METHODS.get(str(method), str(method)) if method else _PARTS.get(last)
    by = f" by {name}" if name else ""
    return UnsupportedModelError(
        f"The attention's projections are quantised{by} ('{found}'), and such cannot be taken apart by heads: convert "
        "the model that was quantised, and quantise the result."
    )


def part_of_quantised(module: str, checkpoint: Checkpoint) -> str | None:
    """A tensor of a module that shows that it is quantised, or None. module: with the closing dot."""
    tensors = checkpoint.tensors
    weight = tensors.get(f"{module}weight")
    if weight is None:
        return next((name for name in tensors if name.startswith(module) and not name.endswith("bias")), None)
    if weight.dtype not in FLOATS:
        return weight.name
    names = (f"{module}{before}{part}" for part in _PARTS for before in ("", "weight."))
    return next((name for name in names if name in tensors), None)


def _refuse_leftover(checkpoint: Checkpoint) -> None:
    """Raises UnsupportedModelError for plain weights that config.json calls quantised, if transformers takes its word
    for it: it would make quantised modules and find nothing to put into them."""
    config = checkpoint.config.get("quantization_config")
    if not isinstance(config, Mapping) or any(_is_quantised(*item) for item in checkpoint.tensors.items()):
        return
    method = _method(config)
    if method is not None and (method not in _METHODS or method in _LOADS_PLAIN):
        return  # transformers passes over a method that it does not know
    if method == "compressed-tensors" and not config.get("config_groups"):
        return  # nothing is quantised by it but, perhaps, the cache
    named = f"'quant_method' {method} ({_METHODS[method]})" if method else "no 'quant_method'"
    raise UnsupportedModelError(
        f"config.json has a 'quantization_config' with {named}, but no tensor is quantised, so transformers cannot run "
        "the model: remove 'quantization_config' from config.json, and convert it again."
    )


def _method(config: Any) -> str | None:
    """The method that a `quantization_config` names; earlier ones of bitsandbytes name none."""
    if not isinstance(config, Mapping):
        return None
    if config.get("load_in_4bit") or config.get("load_in_8bit"):
        return "bitsandbytes"
    return str(config["quant_method"]) if config.get("quant_method") else None


def _is_quantised(name: str, tensor: TensorEntry) -> bool:
    last = name.rpartition(".")[2]
    return last in _PARTS or (last == "weight" and tensor.dtype not in FLOATS)
