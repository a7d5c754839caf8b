"""Headers of safetensors files: read as the library does, and refused with a message that names file and tensor."""

import random

import pytest
from safetensors import safe_open

from sa_convert.domain.checkpoint import DTYPE_BITS
from sa_convert.errors import CheckpointError
from sa_convert.read.header import read_shard
from support.make_checkpoint import Fake, write_raw, write_safetensors


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_agrees_with_the_safetensors_library_on_every_dtype(tmp_path):
    fakes = {f"a.{dtype}": Fake(dtype, (8, 3)) for dtype in DTYPE_BITS} | {
        "scalar": Fake("F64", ()),
        "none": Fake("I8", (0, 5)),
    }
    names = list(fakes)
    random.Random(1).shuffle(names)
    file = write_safetensors(
        tmp_path / "x.safetensors", {name: fakes[name] for name in names}, {"format": "pt", "é": "ü"}
    )
    shard = read_shard(file)
    assert [entry.name for entry in shard.tensors] == names
    assert shard.metadata == {"format": "pt", "é": "ü"}
    assert shard.tensors[-1].stop == file.stat().st_size
    with safe_open(file, "numpy") as library:
        assert set(library.keys()) == set(names)
        for entry in shard.tensors:
            view = library.get_slice(entry.name)
            assert tuple(view.get_shape()) == entry.shape
            assert view.get_dtype() == entry.dtype


def test_tensors_come_in_the_order_of_their_bytes_not_of_the_header(tmp_path):
    fakes = {"b": Fake("U8", (3,), b"bbb"), "a": Fake("F16", (1,), b"aa"), "c": Fake("U8", (1,), b"c")}
    file = write_safetensors(tmp_path / "x.safetensors", fakes, names=["c", "a", "b"])
    shard = read_shard(file)
    assert [entry.name for entry in shard.tensors] == ["b", "a", "c"]
    data = file.read_bytes()
    assert [data[entry.start : entry.stop] for entry in shard.tensors] == [b"bbb", b"aa", b"c"]


def test_a_file_without_tensors_is_valid(tmp_path):
    assert read_shard(write_raw(tmp_path / "x.safetensors", {})).tensors == ()


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        (b"", b"", 10**9, "says its header has 1000000000 bytes, more than any"),
        (b"{}", b"", 50, "says its header has 50 bytes, but is 10 bytes long"),
        (b"{nonsense", b"", None, "the header is not a JSON object"),
        (b"[1, 2]", b"", None, "the header is not a JSON object"),
        (b'{"a": "\xff"}', b"", None, "the header is not a JSON object"),
        (b"[" * 200_000, b"", None, "the header is not a JSON object"),
        (b'{"a":' * 200_000, b"", None, "the header is not a JSON object"),
        ({"__metadata__": {"epoch": 3}}, b"", None, "'epoch' in '__metadata__' is not a string"),
        ({"__metadata__": ["pt"]}, b"", None, "'__metadata__' in the header is not an object"),
        ({"w": 3}, b"", None, "tensor 'w' is described by no object"),
        ({"w": tensor("F31")}, bytes(8), None, "tensor 'w' has the unknown dtype \"F31\""),
        ({"w": {"shape": [2]}}, bytes(8), None, "tensor 'w' has the unknown dtype null"),
        ({"w": tensor(shape=(-2,))}, bytes(8), None, "tensor 'w' has the shape [-2]"),
        ({"w": tensor(shape=(2.0,))}, bytes(8), None, "tensor 'w' has the shape [2.0]"),
        ({"w": tensor(shape=(True, 2))}, bytes(8), None, "tensor 'w' has the shape [true, 2]"),
        ({"w": tensor(offsets=(8, 0))}, bytes(8), None, "tensor 'w' has the data_offsets [8, 0], no range"),
        ({"w": tensor(offsets=(0, 8, 9))}, bytes(9), None, "tensor 'w' has the data_offsets [0, 8, 9], no range"),
        ({"w": tensor(shape=(3,))}, bytes(8), None, "tensor 'w' has 8 bytes, which do not fit F32 of shape [3]"),
        ({"w": tensor("F4", (3,), (0, 2))}, bytes(2), None, "which do not fit F4 of shape [3]"),
        ({"w": tensor()}, bytes(5), None, "tensor 'w' ends at byte"),
        ({"w": tensor()}, bytes(9), None, "1 bytes after tensor 'w' belong to no tensor"),
        ({"w": tensor(offsets=(4, 12))}, bytes(12), None, "4 bytes between the header and tensor 'w' belong to no"),
        ({"v": tensor(), "w": tensor(offsets=(4, 12))}, bytes(12), None, "of tensor 'v' and of tensor 'w' overlap"),
        ({"v": tensor(), "w": tensor()}, bytes(8), None, "overlap"),
        (b'{"w":1,"w":2}', b"", None, "the header names 'w' twice"),
    ],
)  # fmt: skip
def test_refuses_what_is_not_safetensors(tmp_path, header, data, length, message):
    file = write_raw(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(CheckpointError) as error:
        read_shard(file)
    assert message in str(error.value)
    assert str(file) in str(error.value)
    cut = ("but is 10 bytes long", "ends at byte")
    assert ("download it again" in str(error.value)) == any(words in message for words in cut)
    assert "\n" not in str(error.value)
    with pytest.raises(Exception):  # noqa: B017, PT011 - the library's own class, whatever it is called
        safe_open(file, "numpy").__enter__()


def test_refuses_short_and_absent_files(tmp_path):
    (tmp_path / "short").write_bytes(b"1234567")
    with pytest.raises(CheckpointError, match="7 bytes long, too short for safetensors"):
        read_shard(tmp_path / "short")
    with pytest.raises(CheckpointError, match=r"absent: cannot be read: No such file"):
        read_shard(tmp_path / "absent")
