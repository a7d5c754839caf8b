"""Damage to a file's bytes, of any format."""

import random

_INTERESTING = (b"\x00", b"\xff", b"\x7f", b"\x80", b"\n", b'"', b"{", b"[", b"}", b":", b"-", b"9", b"\xed\xa0\x80")
_LENGTHS = (0, 1, 2, 7, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 100_000_000, 100_000_001, 2**31 - 1, 2**31, 2**32 - 1, 2**53,
            2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1)  # fmt: skip


def mutate_bytes(data: bytes, chance: random.Random, focus: int | None = None) -> bytes:
    """The data with one to four changes. focus: bytes from the start in which most of the changes lie."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        data = chance.choice(_WAYS)(data, chance, focus or len(data))
    return data


def _place(data: bytes, chance: random.Random, focus: int) -> int:
    end = min(len(data), focus) if chance.random() < 0.9 else len(data)
    return chance.randrange(end) if end else 0


def _flip_bit(data: bytes, chance: random.Random, focus: int) -> bytes:
    at = _place(data, chance, focus)
    return data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :] if data else data


def _set_byte(data: bytes, chance: random.Random, focus: int) -> bytes:
    at = _place(data, chance, focus)
    return data[:at] + chance.choice(_INTERESTING) + data[at + 1 :]


def _insert(data: bytes, chance: random.Random, focus: int) -> bytes:
    at = _place(data, chance, focus)
    return data[:at] + chance.randbytes(chance.choice((1, 2, 8, 100))) + data[at:]


def _remove(data: bytes, chance: random.Random, focus: int) -> bytes:
    at = _place(data, chance, focus)
    return data[:at] + data[at + chance.choice((1, 2, 8, 100)) :]


def _repeat(data: bytes, chance: random.Random, focus: int) -> bytes:
    """A piece stands twice."""
    at, length = _place(data, chance, focus), chance.choice((1, 8, 100, 1000))
    return data[: at + length] + data[at : at + length] + data[at + length :]


def _splice(data: bytes, chance: random.Random, focus: int) -> bytes:
    """A piece of one place stands at another."""
    source, target, length = _place(data, chance, focus), _place(data, chance, focus), chance.choice((1, 4, 32, 300))
    return data[:target] + data[source : source + length] + data[target + length :]


def _truncate(data: bytes, chance: random.Random, focus: int) -> bytes:
    return data[: _place(data, chance, focus)]


def _cut_end(data: bytes, chance: random.Random, focus: int) -> bytes:
    return data[: -chance.choice((1, 2, 8, 100, 4096))]


def _append(data: bytes, chance: random.Random, focus: int) -> bytes:
    return data + chance.choice((b"\0", b" ", b"\n}", chance.randbytes(8), bytes(4096)))


def _length(data: bytes, chance: random.Random, focus: int) -> bytes:
    """Eight or four bytes become a number that is large, or at a border."""
    size = chance.choice((4, 8))
    at = chance.choice((0, _place(data, chance, focus)))
    number = chance.choice(_LENGTHS) % 256**size
    return data[:at] + number.to_bytes(size, "little") + data[at + size :]


def _empty(data: bytes, chance: random.Random, focus: int) -> bytes:
    return chance.choice((b"", b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n"), bytes(len(data)), b" \n"))


_WAYS = (
    *(_flip_bit, _set_byte, _insert, _remove, _repeat, _splice, _truncate) * 2,
    *(_cut_end, _append, _length, _empty),
)
