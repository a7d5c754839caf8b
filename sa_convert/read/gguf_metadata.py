"""The metadata of one .gguf file while its config is made: which keys have been taken, and what of the others."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sa_convert.errors import CheckpointError, UnsupportedModelError
from sa_convert.read.gguf_architecture import NEUTRAL, Architecture
from sa_convert.read.gguf_header import FOLDER, REMAKE, GgufHeader

HEADS, GROUPS = "attention.head_count", "attention.head_count_kv"
HIDDEN, DEPTH, CONTEXT = "embedding_length", "block_count", "context_length"

_SIZES_OF_EXPERTS = (
    ("expert_feed_forward_length", "blk.0.ffn_gate_exps.weight", 1),
    ("expert_shared_feed_forward_length", "blk.0.ffn_gate_shexp.weight", 0),
)
"""Keys that old files lack, and the tensor and axis that tell the same."""


@dataclass(frozen=True)
class Metadata:
    """The metadata of a file, by the entry for its architecture.

    own: the architecture's keys, without its name, and llama.cpp's values for what a file may leave out.

    taken: the keys that the config follows so far.
    """

    header: GgufHeader
    entry: Architecture
    own: Mapping[str, Any]
    taken: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, header: GgufHeader, entry: Architecture) -> "Metadata":
        """Raises CheckpointError if the file does not tell the shape of its model."""
        own = header.own()
        found = cls(header, entry, own)
        for key in (HIDDEN, DEPTH, HEADS, CONTEXT):
            value = own.get(key)
            if key == CONTEXT and entry.rotary == "none" and value is None:
                continue
            for number in value if isinstance(value, list) and value else [value]:
                if not isinstance(number, int) or isinstance(number, bool) or not 0 < number < 2**31:
                    raise found.wrong(key, f"should be a positive whole number, but is {value!r}")
        own.setdefault(GROUPS, own[HEADS])
        found._check_counts()
        used = {entry.keys.get(key) for key in own}
        for key, tensor, axis in _SIZES_OF_EXPERTS:
            shape = header.tensors[tensor].shape if tensor in header.tensors else ()
            if key in entry.keys and entry.keys[key] not in used and axis < len(shape):
                own[key] = shape[axis]
        return found

    def _check_counts(self) -> None:
        """Raises CheckpointError if the file has tensors of more or fewer layers or experts than it says."""
        layers: dict[str, set[str]] = {}
        experts = self.own.get("expert_count") or 0
        stacks = {pattern.partition("blk.")[0] for pattern in self.entry.tensors if "blk." in pattern}
        for name, tensor in self.header.tensors.items():
            stack, found, rest = name.partition("blk.")
            if found and stack in stacks:
                layers.setdefault(stack, set()).add(rest.partition(".")[0])
            if name.endswith("_exps.weight") and (len(tensor.shape) != 3 or tensor.shape[0] != experts):
                raise self.wrong("expert_count", f"is {experts!r}, but '{name}' is of shape {list(tensor.shape)}")
        for stack, numbers in layers.items():
            key = "decoder_block_count" if stack == "dec." and "decoder_block_count" in self.own else DEPTH
            if self.own[key] != len(numbers):
                raise self.wrong(key, f"is {self.own[key]!r}, but the layers that have tensors are {len(numbers)}")

    def take(self, key: str, default: Any = None) -> Any:
        """The value that a key has for all layers, or the default. Raises UnsupportedModelError if layers differ."""
        self.taken.add(key)
        value = self.own.get(key, default)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise self.beyond(key, f"differs from layer to layer ({str(value)[:60]})")
        return value[0]

    def count(self, key: str, default: int) -> int:
        """As `take`, of a positive whole number. Raises CheckpointError too."""
        value = self.take(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(key, f"should be a positive whole number, but is {value!r}")
        return value

    def refuse_rest(self) -> None:
        """Raises UnsupportedModelError for a key that is neither taken nor changes anything with its value."""
        for key, value in self.own.items():
            if key not in self.taken and value not in self.entry.neutral.get(key, NEUTRAL.get(key, ())):
                raise self.beyond(key, f"is {repr(value)[:60]}")

    def name(self, key: str) -> str:
        return f"'{self.header.architecture}.{key}'"

    def wrong(self, key: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.header.file}: {self.name(key)} {what}; {REMAKE}.")

    def beyond(self, key: str, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.header.file}: {self.name(key)} {what}, which a model of type '{self.entry.model_type}' cannot "
            f"follow when it is read from GGUF, and so would compute something else; {FOLDER}."
        )
