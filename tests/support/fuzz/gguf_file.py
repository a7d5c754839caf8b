"""A .gguf file, written by hand so that every field of it can be wrong."""

import random
import struct
from dataclasses import dataclass, field
from math import prod

from support.fuzz.mutate_bytes import mutate_bytes

UINT32, FLOAT32, STRING, ARRAY = 4, 6, 8, 9
F32 = 0
ALIGNMENT = 32
_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


@dataclass
class Tensor:
    """dims: as the file has them, the fastest first. offset: None for where the data are."""

    name: bytes
    dims: list[int]
    type: int = F32
    offset: int | None = None


@dataclass
class Gguf:
    """The parts of a file. counts: of tensors and keys in the header, None for the true ones. data: its bytes."""

    version: int = 3
    keys: list[tuple[bytes, int, object]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    counts: tuple[int | None, int | None] = (None, None)
    data: int | None = None

    def encode(self) -> bytes:
        tensors = len(self.tensors) if self.counts[0] is None else self.counts[0]
        keys = len(self.keys) if self.counts[1] is None else self.counts[1]
        out = b"GGUF" + struct.pack("<IQQ", self.version, tensors, keys)
        for name, kind, value in self.keys:
            out += _string(name) + struct.pack("<I", kind) + _value(kind, value)
        position = 0
        for tensor in self.tensors:
            out += _string(tensor.name) + struct.pack("<I", len(tensor.dims))
            out += b"".join(struct.pack("<Q", dim % 2**64) for dim in tensor.dims)
            offset = position if tensor.offset is None else tensor.offset
            out += struct.pack("<IQ", tensor.type % 2**32, offset % 2**64)
            size = prod(tensor.dims) * 4
            position += (size if size < 2**20 else 0) + -size % ALIGNMENT
        out += bytes(-len(out) % ALIGNMENT)
        return out + bytes(position if self.data is None else self.data)


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _value(kind: int, value: object) -> bytes:
    if isinstance(value, bytes):
        return _string(value) if kind == STRING else value
    if isinstance(value, tuple):
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(_value(inner, item) for item in items)
    if kind not in _FORMATS:
        return struct.pack("<Q", int(value) % 2**64)  # type: ignore[call-overload]
    if kind in (6, 12):
        return struct.pack(_FORMATS[kind], float(value))  # type: ignore[arg-type]
    size = struct.calcsize(_FORMATS[kind])
    return (int(value) % 256**size).to_bytes(size, "little")  # type: ignore[call-overload]


def tiny_gguf() -> Gguf:
    """A Llama of 4 layers, 4 query heads of 8 and 2 KV groups, with a tokenizer of 40 tokens, all of it zeros."""
    hidden, heads, groups, inner, layers = 32, 4, 2, 64, 4
    tokens = [b"<unk>", b"<s>", b"</s>", b"t", b"1", b"t1", *(b"u%d" % index for index in range(34))]
    keys: list[tuple[bytes, int, object]] = [
        (b"general.architecture", STRING, b"llama"), (b"llama.context_length", UINT32, 64),
        (b"llama.embedding_length", UINT32, hidden), (b"llama.block_count", UINT32, layers),
        (b"llama.feed_forward_length", UINT32, inner), (b"llama.attention.head_count", UINT32, heads),
        (b"llama.attention.head_count_kv", UINT32, groups), (b"llama.attention.layer_norm_rms_epsilon", FLOAT32, 1e-5),
        (b"llama.vocab_size", UINT32, len(tokens)), (b"llama.rope.dimension_count", UINT32, hidden // heads),
        (b"llama.rope.freq_base", FLOAT32, 10000.0), (b"tokenizer.ggml.model", STRING, b"gpt2"),
        (b"tokenizer.ggml.tokens", ARRAY, (STRING, tokens)), (b"tokenizer.ggml.token_type", ARRAY, (5,
        [1] * len(tokens))),
        (b"tokenizer.ggml.merges", ARRAY, (STRING, [b"t 1"])), (b"tokenizer.ggml.bos_token_id", UINT32, 1),
        (b"tokenizer.ggml.eos_token_id", UINT32, 2),
    ]  # fmt: skip
    narrow = groups * (hidden // heads)
    shapes = {"token_embd": (len(tokens), hidden), "output_norm": (hidden,), "output": (len(tokens), hidden)}
    for layer in range(layers):
        start = f"blk.{layer}."
        shapes |= {
            f"{start}attn_norm": (hidden,), f"{start}ffn_norm": (hidden,), f"{start}attn_q": (hidden, hidden),
            f"{start}attn_output": (hidden, hidden), f"{start}attn_k": (narrow, hidden), f"{start}attn_v": (narrow,
            hidden),
            f"{start}ffn_gate": (inner, hidden), f"{start}ffn_up": (inner, hidden), f"{start}ffn_down": (hidden, inner),
        }  # fmt: skip
    tensors = [Tensor(f"{name}.weight".encode(), list(reversed(shape))) for name, shape in shapes.items()]
    return Gguf(keys=keys, tensors=tensors)


_NUMBERS = (0, 1, 2, 3, 5, 31, 33, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
_TEXTS = (b"", b"x", b"llama", b"gpt2", b"qwen2", b"bert", b"\xff\xfe", b"a" * 100_000, b"\x00", b"general.alignment",
          b"blk.0.attn_q.weight", b"blk.99999999999.attn_q.weight", b"rope_freqs.weight", b"\x1b[31m")  # fmt: skip


def mutate_gguf(chance: random.Random) -> bytes:
    """A damaged file: its bytes, or one to three of its fields."""
    file = tiny_gguf()
    if chance.random() < 0.35:
        data = file.encode()
        return mutate_bytes(data, chance, focus=len(data) - sum(prod(tensor.dims) * 4 for tensor in file.tensors))
    for _ in range(chance.choice((1, 1, 2, 3))):
        chance.choice((_header, _key, _key, _key, _tensor, _tensor, _data))(file, chance)
    return file.encode()


def _header(file: Gguf, chance: random.Random) -> None:
    if chance.random() < 0.3:
        file.version = chance.choice((0, 1, 2, 4, 3 << 24, 2**32 - 1))
    else:
        counts = [None, None]
        counts[chance.randrange(2)] = chance.choice(_NUMBERS)  # type: ignore[call-overload]
        file.counts = (counts[0], counts[1])


def _key(file: Gguf, chance: random.Random) -> None:
    if not file.keys:
        return
    at = chance.randrange(len(file.keys))
    name, kind, value = file.keys[at]
    way = chance.randrange(7)
    if way == 0:
        del file.keys[at]
    elif way == 1:
        file.keys.append(file.keys[at])
    elif way == 2:
        file.keys[at] = (chance.choice((*_TEXTS, name + b"x")), kind, value)
    elif way == 3:  # another type than the value has
        other = chance.choice((0, 1, 5, 6, 7, 8, 9, 10, 12, 13, 99, 2**32 - 1))
        file.keys[at] = (name, other, chance.choice((1, b"\x01" * 8)))
    elif way == 4 and isinstance(value, tuple):
        depth = chance.choice((1, 3, 2000, 100_000))
        nested = struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQI", UINT32, 1, 1)
        empty = (value[0], [])
        huge = struct.pack("<IQ", value[0], chance.choice(_NUMBERS))
        file.keys[at] = (name, kind, chance.choice((nested, empty, huge, (99, [1]), (value[0], value[1] * 2))))
    elif kind == STRING:
        file.keys[at] = (name, kind, chance.choice(_TEXTS))
    elif kind == FLOAT32:
        file.keys[at] = (name, kind, chance.choice((0.0, -1.0, float("nan"), float("inf"), 1e-30, 3e38)))
    elif kind == UINT32:
        file.keys[at] = (name, kind, chance.choice(_NUMBERS))
    else:
        file.keys.insert(at, (b"general.alignment", UINT32, chance.choice(_NUMBERS)))


def _tensor(file: Gguf, chance: random.Random) -> None:
    if not file.tensors:
        return
    at = chance.randrange(len(file.tensors))
    tensor = file.tensors[at]
    way = chance.randrange(6)
    if way == 0:
        del file.tensors[at]
    elif way == 1:
        file.tensors.append(tensor)
    elif way == 2:
        tensor.name = chance.choice((*_TEXTS, tensor.name + b"x"))
    elif way == 3:
        odd = ([], [0], [2**32, 2**32], [2**63], [1] * 40, [2**64 - 1, 2], [3, 5, 7])
        tensor.dims = chance.choice((tensor.dims[::-1], [*tensor.dims, 1], *odd))
    elif way == 4:
        tensor.type = chance.choice((1, 2, 8, 12, 14, 30, 39, 99, 2**32 - 1))
    else:
        tensor.offset = chance.choice((*_NUMBERS, 32, 64))


def _data(file: Gguf, chance: random.Random) -> None:
    file.data = chance.choice((0, 1, 32, 4096, 2**20))
