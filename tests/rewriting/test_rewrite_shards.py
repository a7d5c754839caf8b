"""Weights rewritten by byte ranges: what stays is the same bytes, what goes is gone, and the result is safetensors."""

import errno
import hashlib
import json
import os
import random
import threading

import pytest
from safetensors import safe_open

from sa_convert.domain.checkpoint import DTYPE_BITS, TensorEdit
from sa_convert.errors import CheckpointError
from sa_convert.read.folder import open_folder
from sa_convert.read.header import read_shard
from sa_convert.rewrite import ranges
from sa_convert.rewrite.shards import write_shards
from sa_convert.treatments.tensor_edits import combined
from support.make_checkpoint import Fake, tiny_llama, write_model, write_safetensors

DROP = TensorEdit(rows=())


def content(tensor):
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        return stream.read(tensor.bytes)


def copying():
    return [thread for thread in threading.enumerate() if "ThreadPoolExecutor" in thread.name]


def digest(tensor):
    return hashlib.sha256(content(tensor)).hexdigest()


def rewritten(folder, edits, out):
    out.mkdir()
    counts = []
    base = open_folder(folder)
    written = write_shards(base, edits, out, counts.append)
    assert sum(counts) == written.total_bytes == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    return base, written, open_folder(out)


def test_all_dtypes_in_odd_order_with_metadata_stay_byte_identical(tmp_path):
    fakes = {f"{index}.{dtype}": Fake(dtype, (8, 5)) for index, dtype in enumerate(DTYPE_BITS)}
    fakes |= {"scalar": Fake("BF16", ()), "none": Fake("F16", (0, 3)), "ü": Fake("F32", (7,))}
    names = list(fakes)
    random.Random(3).shuffle(names)
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    metadata = {"format": "pt", "license": "é"}
    write_safetensors(
        folder / "model.safetensors", {name: fakes[name] for name in names}, metadata, names=sorted(names)
    )
    gone = {names[4], names[11], names[12]}
    base, written, result = rewritten(folder, dict.fromkeys(gone, DROP), tmp_path / "out")
    (shard,) = result.shards
    assert [tensor.name for tensor in shard.tensors] == [name for name in names if name not in gone]
    assert shard.metadata == metadata
    assert result.index is None
    for tensor in shard.tensors:
        old = base.tensors[tensor.name]
        assert (tensor.dtype, tensor.shape, digest(tensor)) == (old.dtype, old.shape, digest(old))
    assert written.tensor_bytes == sum(tensor.bytes for tensor in shard.tensors)
    assert written.parameters == sum(tensor.elements for tensor in shard.tensors)
    with safe_open(shard.file, "numpy") as library:
        assert set(library.keys()) == set(names) - gone
        assert library.metadata() == metadata


def test_rows_renames_and_sharded_layout(tmp_path):
    folder = tiny_llama(tmp_path / "base", 3)
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["metadata"]["total_parameters"] = 1_000_000
    index["metadata"]["note"] = "kept"
    index["weight_map"] = dict(reversed(index["weight_map"].items()))
    index_file.write_text(json.dumps(index))
    q, k, b = (f"model.layers.2.self_attn.{name}_proj.weight" for name in "qkv")
    edits = {
        q: TensorEdit(rows=((0, 8), (16, 17), (17, 24))),
        k: DROP,
        b: TensorEdit(name="renamed"),
        "lm_head.weight": TensorEdit(),
    }
    base, written, result = rewritten(folder, edits, tmp_path / "out")
    old, new = base.tensors, result.tensors
    assert set(new) == set(old) - {k, b} | {"renamed"}
    assert new[q].shape == (16, 32)
    row = 32 * 2
    data = content(old[q])
    assert content(new[q]) == data[: 8 * row] + data[16 * row : 24 * row]
    assert content(new["renamed"]) == content(old[b])
    assert all(digest(new[name]) == digest(old[name]) for name in set(old) - {q, k, b})
    assert [shard.file.name for shard in result.shards] == [shard.file.name for shard in base.shards]
    removed = (16 + 16) * 32
    assert result.index["metadata"] == {
        "total_size": index["metadata"]["total_size"] - removed * 2,
        "total_parameters": 1_000_000 - removed,
        "note": "kept",
    }
    order = ["renamed" if name == b else name for name in index["weight_map"] if name != k]
    assert list(result.index["weight_map"]) == order
    assert written.parameters == sum(tensor.elements for tensor in old.values()) - removed
    assert written.files == {shard.file.name: shard.file.stat().st_size for shard in result.shards}


def test_tensors_of_other_shapes_take_the_place_of_old_ones_and_new_ones_follow_them(tmp_path):
    folder = tiny_llama(tmp_path / "base", 3)
    q, k, v = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv")
    basis = "model.layers.1.self_attn.k_basis.weight"
    write_safetensors(tmp_path / "new.safetensors", {"k": Fake("F32", (6, 32)), "basis": Fake("F16", (16, 6))})
    made = {tensor.name: tensor for tensor in read_shard(tmp_path / "new.safetensors").tensors}
    edits = {
        k: TensorEdit(replacement=made["k"]),
        basis: TensorEdit(replacement=made["basis"], after=k),
        v: TensorEdit(rows=((0, 8),)),
    }
    base, written, result = rewritten(folder, edits, tmp_path / "out")
    old, new = base.tensors, result.tensors
    assert set(new) == set(old) | {basis}
    for name, source in ((k, "k"), (basis, "basis")):
        assert (new[name].dtype, new[name].shape, digest(new[name])) == (
            made[source].dtype, made[source].shape, digest(made[source])
        )  # fmt: skip
    assert new[basis].file.name == old[k].file.name
    assert result.index["weight_map"][basis] == old[k].file.name
    names = [tensor.name for shard in result.shards for tensor in shard.tensors if tensor.file.name == old[k].file.name]
    assert names.index(basis) == names.index(k) + 1
    assert written.parameters == sum(tensor.elements for tensor in new.values())
    assert digest(new[q]) == digest(old[q])
    with pytest.raises(ValueError, match="does not have: nowhere"):
        write_shards(base, {basis: TensorEdit(replacement=made["k"], after="nowhere")}, tmp_path / "x", lambda _: None)


def test_of_two_edits_what_both_keep_stays():
    one = {"a": TensorEdit(rows=((0, 8), (16, 24))), "b": DROP, "c": TensorEdit(name="d")}
    other = {"a": TensorEdit(rows=((4, 20),)), "b": TensorEdit(rows=((0, 1),)), "e": DROP}
    assert combined(one, other, "toy") == {
        "a": TensorEdit(rows=((4, 8), (16, 20))), "b": DROP, "c": TensorEdit(name="d"), "e": DROP
    }  # fmt: skip
    with pytest.raises(ValueError, match="toy and c: two treatments edit the tensor"):
        combined(one, {"c": TensorEdit(rows=((0, 1),))}, "toy")


def test_a_shard_that_loses_all_tensors_is_still_a_valid_file(tmp_path):
    folder = tiny_llama(tmp_path / "base", 3)
    base = open_folder(folder)
    edits = {tensor.name: DROP for tensor in base.shards[1].tensors}
    _, written, result = rewritten(folder, edits, tmp_path / "out")
    name = base.shards[1].file.name
    empty = read_shard(tmp_path / "out" / name)
    assert (empty.tensors, empty.metadata) == ((), {"format": "pt"})
    assert name in written.files
    assert name not in result.index["weight_map"].values()
    with safe_open(empty.file, "numpy") as library:
        assert list(library.keys()) == []


def test_tensors_stay_aligned_where_they_were(tmp_path):
    """Dropping seven bytes in front of a float would leave it at an odd place."""
    folder = tmp_path / "base"
    fakes = {"a": Fake("U8", (1,)), "b": Fake("U8", (7,)), "c": Fake("F64", (2,)), "d": Fake("F16", (2,))}
    write_model(folder, {}, fakes)
    base, _, result = rewritten(folder, {"b": DROP}, tmp_path / "out")
    for tensor in result.shards[0].tensors:
        assert tensor.start % (DTYPE_BITS[tensor.dtype] // 8) == 0
        assert digest(tensor) == digest(base.tensors[tensor.name])
    assert [tensor.name for tensor in result.shards[0].tensors] == ["c", "d", "a"]


@pytest.mark.parametrize("spaces", [0, 8, 4000, 5])
def test_pages_stay_congruent_with_the_base(tmp_path, spaces):
    folder = tiny_llama(tmp_path / "base")
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    file.write_bytes(
        (length + spaces).to_bytes(8, "little") + data[8 : 8 + length] + b" " * spaces + data[8 + length :]
    )
    _, _, result = rewritten(folder, {"lm_head.weight": DROP}, tmp_path / "out")
    start = result.shards[0].tensors[0].start
    assert start % 8 == 0
    assert spaces % 8 or start % 4096 == (8 + length + spaces) % 4096


def test_rows_of_elements_below_a_byte_end_at_whole_bytes(tmp_path):
    folder = tmp_path / "base"
    write_model(folder, {}, {"even": Fake("F4", (4, 6)), "odd": Fake("F4", (4, 3)), "six": Fake("F6_E2M3", (8, 2))})
    base, _, result = rewritten(
        folder,
        {"even": TensorEdit(((1, 2),)), "odd": TensorEdit(((2, 4),)), "six": TensorEdit(((2, 4),))},
        tmp_path / "out",
    )
    assert content(result.tensors["even"]) == content(base.tensors["even"])[3:6]
    assert content(result.tensors["odd"]) == content(base.tensors["odd"])[3:6]
    assert content(result.tensors["six"]) == content(base.tensors["six"])[3:6]
    with pytest.raises(
        CheckpointError, match=r"rows 1 to 2 of tensor 'odd' \(F4\) do not begin and end at whole bytes"
    ):
        write_shards(base, {"odd": TensorEdit(((1, 2),))}, tmp_path, print)


@pytest.mark.parametrize(
    "edits",
    [
        {"absent": DROP},
        {"lm_head.weight": TensorEdit(name="model.norm.weight")},
        {"lm_head.weight": TensorEdit(rows=((0, 99),))},
        {"lm_head.weight": TensorEdit(rows=((4, 8), (0, 5)))},
    ],
)
def test_impossible_edits_write_nothing(tmp_path, edits):
    base = open_folder(tiny_llama(tmp_path / "base"))
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"absent|same name|overlap, or are not"):
        write_shards(base, edits, tmp_path / "out", print)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("failing", [(), ("copy_file_range",), ("copy_file_range", "sendfile")])
@pytest.mark.parametrize("number", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, 0])
def test_every_way_of_copying_copies_the_same(tmp_path, monkeypatch, failing, number):
    data = random.Random(0).randbytes(5_000_000)
    (tmp_path / "a").write_bytes(data)
    monkeypatch.setattr(ranges, "CHUNK", 1_500_000)

    def fail(*arguments):
        if number:
            raise OSError(number, os.strerror(number))
        return 0

    for name in failing:
        monkeypatch.setattr(os, name, fail)
    counts = []
    with (tmp_path / "a").open("rb") as source, (tmp_path / "b").open("wb") as target:
        ranges.copy_range(source.fileno(), 7, 4_000_007, target.fileno(), 100, counts.append)
        ranges.copy_range(source.fileno(), 1, 51, target.fileno(), 20, counts.append)
    expected = bytearray(100) + data[7:4_000_007]
    expected[20:70] = data[1:51]
    assert (tmp_path / "b").read_bytes() == expected
    assert sum(counts) == 4_000_050
    assert max(counts) <= 1_500_000


def test_reserving_room_changes_nothing_but_fails_at_once_where_there_is_none(tmp_path):
    with (tmp_path / "a").open("wb") as target:
        ranges.reserve(target.fileno(), 0)
        ranges.reserve(target.fileno(), 5000)
        with pytest.raises(OSError, match=r"No space left|File too large"):
            ranges.reserve(target.fileno(), 2**62)
        target.write(b"xyz")
    assert (tmp_path / "a").stat().st_size == 5000
    assert (tmp_path / "a").read_bytes() == b"xyz" + bytes(4997)


def test_real_errors_are_not_taken_for_missing_abilities(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    base = open_folder(tiny_llama(tmp_path / "base", 4))
    (tmp_path / "out").mkdir()
    before = copying()  # models that earlier tests loaded may have left some
    with pytest.raises(OSError, match="No space left"):
        write_shards(base, {}, tmp_path / "out", lambda count: None)
    assert not set(copying()) - set(before)


def test_a_base_that_shrinks_while_it_is_copied(tmp_path):
    base = open_folder(tiny_llama(tmp_path / "base"))
    os.truncate(base.shards[0].file, base.shards[0].file.stat().st_size - 10)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="became shorter while it was copied"):
        write_shards(base, {}, tmp_path / "out", lambda count: None)


def test_an_error_in_the_callers_callback_stops_the_copy(tmp_path):
    base = open_folder(tiny_llama(tmp_path / "base", 4))
    (tmp_path / "out").mkdir()

    def interrupt(count):
        raise KeyboardInterrupt

    before = copying()
    with pytest.raises(KeyboardInterrupt):
        write_shards(base, {}, tmp_path / "out", interrupt)
    assert not set(copying()) - set(before)
