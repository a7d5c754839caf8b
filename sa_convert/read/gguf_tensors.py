"""What becomes of every tensor of a .gguf file: its place in the model, or why it is left out, or a refusal."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from sa_convert.domain.checkpoint import DTYPE_BITS, FLOATS, Shard, TensorEntry
from sa_convert.errors import CheckpointError, UnsupportedModelError
from sa_convert.read.gguf_architecture import Architecture
from sa_convert.read.gguf_config import MORE_LAYERS, pattern_of
from sa_convert.read.gguf_header import FOLDER, REMAKE, GgufHeader, GgufTensor
from sa_convert.read.gguf_rope import TENSORS as ROPE_TENSORS

_DTYPES = {name: word for word, name in FLOATS.items()}
_LAYER = re.compile(r"\d+")


@dataclass(frozen=True)
class Account:
    """What the model has of a file's tensors.

    taken: shape of each tensor of the model by its name, and `sources`, the tensors of the file that it comes from.

    zeros: shapes of biases that the model has and the file has not, which are nothing but zeros then. left_out: for
    tensors that change nothing, the reason.
    """

    taken: Mapping[str, tuple[int, ...]]
    sources: Mapping[str, str]
    zeros: Mapping[str, tuple[int, ...]]
    left_out: Mapping[str, str]

    @property
    def held(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors of the model by their names."""
        return {**self.taken, **self.zeros}


def account_of(header: GgufHeader, entry: Architecture, config: Mapping[str, Any]) -> Account:
    """An account of all tensors. Raises UnsupportedModelError, naming the tensor, for one that the model has no place
    for: it would be lost, and the model compute something else."""
    taken: dict[str, tuple[int, ...]] = {}
    sources: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for name, tensor in header.tensors.items():
        reason = _left_out(header, entry, config, name)
        if reason:
            left_out[name] = reason
            continue
        if name in ROPE_TENSORS and entry.rotary != "none":
            continue  # the config tells it
        for module, shape in _places(header, entry, config, tensor):
            taken[module], sources[module] = shape, name
    return Account(taken, sources, _zeros(header, entry, config, taken), left_out)


def shard_of(header: GgufHeader, entry: Architecture, account: Account, dtype: str) -> Shard:
    """The tensors of the model as one safetensors file would have them. dtype: in the words of torch."""
    start, entries = 0, []
    for name, shape in account.held.items():
        module = pattern_of(account.sources.get(name, "")).rpartition(".")[0]
        word = "F32" if dtype == "float16" and module in entry.single else _DTYPES[dtype]
        stop = start + prod(shape) * DTYPE_BITS[word] // 8
        entries.append(TensorEntry(name, word, shape, header.file, start, stop))
        start = stop
    return Shard(header.file, tuple(entries), {"format": "pt"})


def _left_out(header: GgufHeader, entry: Architecture, config: Mapping[str, Any], name: str) -> str | None:
    pattern = pattern_of(name)
    if pattern in entry.left_out:
        return entry.left_out[pattern]
    if name == "output.weight" and entry.always_tied:
        return "a copy of 'token_embd.weight', which the output of such a model always is"
    layer = _LAYER.search(name) if pattern.startswith("blk.{}") else None
    if layer and header.own().get(MORE_LAYERS) and int(layer[0]) >= config["num_hidden_layers"]:
        return "part of a layer that predicts further tokens, for which transformers has no module"
    return None


def _places(
    header: GgufHeader, entry: Architecture, config: Mapping[str, Any], tensor: GgufTensor
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the model of what one tensor holds."""
    pattern = pattern_of(tensor.name)
    number = next(iter(_LAYER.findall(tensor.name)), "") if "{}" in pattern else ""
    if pattern in entry.whole:
        yield entry.whole[pattern].replace("{}", number), tensor.shape
        return
    ours, _, ending = pattern.rpartition(".")
    theirs = entry.tensors.get(ours)
    biased = ours in entry.biased or any(config[key] and ours in names for key, names in entry.biases.items())
    if theirs is None or ending not in (("weight", "bias") if biased else ("weight",)):
        raise UnsupportedModelError(
            f"{header.file}: holds a tensor '{tensor.name}', for which a model of type '{entry.model_type}' has no "
            f"place when it is read from GGUF, and so would compute something else; {FOLDER}."
        )
    shape = tensor.shape
    if ending == "weight":
        if ours in entry.transposed:
            shape = tuple(reversed(shape))
        if ours in entry.unsqueezed and len(shape) == (1 if entry.unsqueezed[ours] == 0 else 2):
            at = entry.unsqueezed[ours]
            shape = (*shape[:at], 1, *shape[at:])
    name = f"{theirs.replace('{}', number)}.{ending}"
    if "[]" not in name:
        yield name, shape
        return
    if len(shape) != 3:
        raise CheckpointError(
            f"{header.file}: '{tensor.name}' is of shape {list(shape)}, which are no matrices of experts; {REMAKE}."
        )
    for expert in range(shape[0]):
        yield name.replace("[]", str(expert)), shape[1:]


def _zeros(
    header: GgufHeader, entry: Architecture, config: Mapping[str, Any], taken: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Biases that a config key brings along with others, and that the file has not."""
    modules = {module for key, modules in entry.biases.items() if config[key] for module in modules}
    zeros: dict[str, tuple[int, ...]] = {}
    for tensor in header.tensors.values():
        ours, _, ending = pattern_of(tensor.name).rpartition(".")
        if ending == "weight" and ours in modules:
            number = next(iter(_LAYER.findall(tensor.name)), "")
            name = f"{entry.tensors[ours].replace('{}', number)}.bias"
            if name not in taken:
                zeros[name] = tensor.shape[:1]
    return zeros
