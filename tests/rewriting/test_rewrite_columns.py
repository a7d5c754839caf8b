"""Fused projections taken apart: rows in any order, and columns, against torch's own slicing of the loaded tensors."""

import json
import os
import subprocess
import sys

import pytest

from sa_convert.domain.checkpoint import TensorEdit
from sa_convert.errors import CheckpointError
from sa_convert.read.folder import open_folder
from sa_convert.rewrite import columns
from sa_convert.rewrite.shards import plan_shards, write_shards
from support.make_checkpoint import Fake, write_model

FAKES = {
    "before": Fake("BF16", (3, 5)),
    "gpt2.weight": Fake("F32", (10, 48)),
    "gpt2.bias": Fake("F32", (48,)),
    "neox.weight": Fake("BF16", (24, 7)),
    "neox.bias": Fake("F16", (24,)),
    "bytes": Fake("I8", (5, 9)),
    "after": Fake("F32", (4, 4)),
}
# Heads 1 and 3 of four, then all values; GPT-NeoX has query, key and value of a head next to each other.
NEOX = ((6, 8), (18, 20), (8, 10), (20, 22), (4, 6), (10, 12), (16, 18), (22, 24))
GPT2 = ((4, 8), (12, 16), (20, 24), (28, 48))


def write(folder, edits, out):
    out.mkdir()
    base, counts = open_folder(folder), []
    written = write_shards(base, edits, out, counts.append)
    assert sum(counts) == written.total_bytes == (out / "model.safetensors").stat().st_size
    return counts


def loaded(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def taken(tensor, ranges, axis):
    import torch

    places = [place for start, stop in ranges for place in range(start, stop)]
    return tensor.index_select(axis, torch.tensor(places, dtype=torch.long))


def same(a, b):
    import torch

    # As bytes: random ones hold NaN, which equals nothing.
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
    )


@pytest.mark.parametrize("block", [1, 400, columns.BLOCK])
@pytest.mark.parametrize(
    "edits",
    [
        {"gpt2.weight": TensorEdit(GPT2, axis=1), "gpt2.bias": TensorEdit(GPT2)},
        {"gpt2.weight": TensorEdit(((40, 48), (0, 3), (9, 9), (3, 5), (20, 21)), axis=1)},
        {"neox.weight": TensorEdit(NEOX), "neox.bias": TensorEdit(NEOX, name="neox.renamed")},
        {"neox.weight": TensorEdit(((1, 2), (0, 1)), axis=1), "bytes": TensorEdit(((8, 9), (0, 8)), axis=1)},
        {"gpt2.weight": TensorEdit(((0, 48),), axis=1), "before": TensorEdit(((2, 2),), axis=1)},
        {"before": TensorEdit(((4, 5),), axis=1), "bytes": TensorEdit(((2, 3), (4, 5), (0, 1)))},
    ],
)
def test_rows_and_columns_are_those_that_torch_takes(tmp_path, monkeypatch, edits, block):
    monkeypatch.setattr(columns, "BLOCK", block)
    write_model(tmp_path / "base", {}, FAKES)
    write(tmp_path / "base", edits, tmp_path / "out")
    old, new = loaded(tmp_path / "base"), loaded(tmp_path / "out")
    for name, tensor in old.items():
        edit = edits.get(name, TensorEdit())
        expected = tensor if edit.rows is None else taken(tensor, edit.rows, edit.axis)
        assert same(new.pop(edit.name or name), expected), name
    assert not new


def test_narrow_runs_are_gathered_a_few_rows_at_a_time(tmp_path):
    write_model(tmp_path / "base", {}, {"wide": Fake("I8", (50, 2000))})
    every_other = tuple((place, place + 1) for place in range(1998, -1, -2))
    counts = write(tmp_path / "base", {"wide": TensorEdit(every_other, axis=1)}, tmp_path / "out")
    assert max(counts) == columns._VIEWS // 1000 * 1000
    assert same(loaded(tmp_path / "out")["wide"], loaded(tmp_path / "base")["wide"][:, ::2].flip(1))


def test_what_is_not_columns_is_still_copied_in_joined_ranges(tmp_path):
    write_model(tmp_path / "base", {}, FAKES)
    base = open_folder(tmp_path / "base")
    (plan,) = plan_shards(base, {"gpt2.weight": TensorEdit(GPT2, axis=1)})
    first, fused, rest = plan.parts
    assert (first.bytes, rest.bytes) == (30, sum(fake.bytes for fake in list(FAKES.values())[2:]))
    assert isinstance(fused, columns.Columns)
    assert fused.bytes == 10 * 32 * 4


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (TensorEdit(((0, 5), (4, 8)), axis=1), "columns .* overlap, or are not ranges of the 48 columns"),
        (TensorEdit(((4, 8), (0, 5)), axis=1), "overlap"),
        (TensorEdit(((40, 49),), axis=1), "columns"),
        (TensorEdit(((-1, 4),), axis=1), "columns"),
        (TensorEdit(((8, 4),), axis=1), "columns"),
        (TensorEdit(((6, 10), (0, 7))), "rows .* overlap, or are not ranges of the 10 rows"),
        (TensorEdit(((8, 11), (0, 2))), "rows"),
        (TensorEdit(((0, 1),), axis=2), "only axis 0"),
        (TensorEdit(((0, 1),), axis=-1), "only axis 0"),
    ],
)
def test_ranges_that_overlap_or_leave_the_tensor_write_nothing(tmp_path, edit, message):
    base = open_folder(write_model(tmp_path / "base", {}, FAKES))
    with pytest.raises(ValueError, match=message):
        write_shards(base, {"gpt2.weight": edit}, tmp_path / "out", print)
    assert not (tmp_path / "out").exists()


def test_a_vector_has_no_columns(tmp_path):
    base = open_folder(write_model(tmp_path / "base", {}, FAKES))
    with pytest.raises(ValueError, match=r"'gpt2.bias' has shape \(48,\)"):
        plan_shards(base, {"gpt2.bias": TensorEdit(((0, 1),), axis=1)})


def test_columns_of_elements_below_a_byte_end_at_whole_bytes(tmp_path):
    data = bytes(range(12))
    fakes = {"even": Fake("F4", (4, 6), data), "odd": Fake("F4", (4, 3))}
    base = open_folder(write_model(tmp_path / "base", {}, fakes))
    write(tmp_path / "base", {"even": TensorEdit(((4, 6), (0, 2)), axis=1)}, tmp_path / "out")
    result = open_folder_tensor(tmp_path / "out", "even")
    assert result == ((4, 4), bytes([2, 0, 5, 3, 8, 6, 11, 9]))
    for name, ranges in (("even", (1, 2)), ("odd", (0, 2))):
        with pytest.raises(CheckpointError, match=rf"columns {ranges[0]} to 2 of tensor '{name}' \(F4\) do not begin"):
            plan_shards(base, {name: TensorEdit((ranges,), axis=1)})


def open_folder_tensor(folder, name):
    data = (folder / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:length])[name]
    start, stop = entry["data_offsets"]
    return tuple(entry["shape"]), data[length + start : length + stop]


def test_a_base_that_shrinks_while_its_columns_are_read(tmp_path):
    base = open_folder(write_model(tmp_path / "base", {}, {"fused": Fake("F32", (10, 48))}))
    os.truncate(base.shards[0].file, base.shards[0].file.stat().st_size - 10)
    with pytest.raises(CheckpointError, match="became shorter while it was copied"):
        write_shards(base, {"fused": TensorEdit(((0, 1),), axis=1)}, tmp_path / "out", lambda count: None)


MEASURE = """
import sys, time, tracemalloc
from pathlib import Path
from sa_convert.domain.checkpoint import TensorEdit
from sa_convert.read.folder import open_folder
from sa_convert.rewrite.shards import write_shards
base = open_folder(Path(sys.argv[1]))
rows = tuple((64 * head, 64 * head + 64) for head in range(0, 50, 2)) + ((3200, 4800),)
edits = {tensor.name: TensorEdit(rows, axis=1) for tensor in base.shards[0].tensors}
start = time.perf_counter()
write_shards(base, edits, Path(sys.argv[2]), lambda count: None)
seconds = time.perf_counter() - start
tracemalloc.start()
write_shards(base, edits, Path(sys.argv[3]), lambda count: None)
print(seconds, tracemalloc.get_traced_memory()[1])
assert not {"torch", "numpy"} & set(sys.modules)
"""


def test_a_large_model_takes_little_memory(tmp_path):
    """Four of the 48 fused projections of GPT-2 XL, 123 MB. Its process' peak would be pytest's, which it inherits."""
    write_model(tmp_path / "base", {}, {f"h.{layer}": Fake("F32", (1600, 4800)) for layer in range(4)})
    folders = [str(tmp_path / name) for name in ("base", "out", "traced")]
    run = subprocess.run([sys.executable, "-c", MEASURE, *folders], check=True, capture_output=True, text=True)
    seconds, peak = map(float, run.stdout.split())
    print(f"{seconds:.2f} s, {peak / 1e6:.1f} MB")
    assert peak < 10_000_000
