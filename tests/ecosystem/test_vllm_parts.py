"""How the plugin for vLLM divides a plan: the part of it that needs no vLLM."""

import sys

import pytest

from support.processes import ROOT

sys.path.insert(0, str(ROOT / "plugins" / "sa-convert-vllm"))
from sa_convert_vllm.parts import Part, Window, page_classes, parts_of, room, unit_of, windows_of, without_windows
from sa_convert_vllm.sharing import borrowed_of, gone_of, scattered


def plan(layers):
    return {"version": 2, "layers": layers}


def window(tokens, sinks=4):
    return {"window": {"sinks": sinks, "tokens": tokens}}


def span(source, groups=2, size=2):
    return {str(g): {"share": [[source, g * size + k] for k in range(size)]} for g in range(groups)}


def test_windows_leave_the_plan_of_the_folders_code_and_nothing_else_does():
    described = plan(
        {"0": {"1": window(16)}, "1": span(0), "2": "drop", "3": {"0": {**window(8), "low_rank": {"keys": 4}}}}
    )
    assert windows_of(described, 2) == {0: [None, Window(16, 4)], 3: [Window(8, 4), None]}
    assert without_windows(described) == plan({"1": span(0), "2": "drop", "3": {"0": {"low_rank": {"keys": 4}}}})


@pytest.mark.parametrize(
    ("row", "ranks", "unit"),
    [
        ([Window(8, 4)] * 4, 1, 4),
        ([Window(8, 4)] * 2 + [None] * 2, 1, 2),
        ([Window(8, 4)] * 2 + [None] * 2, 2, 2),
        ([None, Window(8, 4), None, None], 1, 1),
        ([Window(8, 4)] * 4, 4, 1),
    ],
)
def test_parts_are_of_one_size_and_cover_every_group_once(row, ranks, unit):
    windows, share = {0: row}, len(row) // ranks
    assert unit_of(windows, len(row), ranks) == unit
    for rank in range(ranks):
        mine = row[rank * share : (rank + 1) * share]
        parts = parts_of(mine, unit)
        assert [group for part in parts for group in range(part.first, part.first + part.count)] == list(range(share))
        assert all(set(mine[part.first : part.first + part.count]) == {part.window} for part in parts)
        assert {part.count for part in parts} == {unit}
    assert parts_of([None, Window(8, 4)], 1) == [Part(0, 1, None), Part(1, 1, Window(8, 4))]


def reserved(counts, full, classes, block, length, at_once):
    """Pages that vLLM reserves for a text, counted as its grouping does: groups of as many layers as the smallest kind
    has (or the largest, if that is less than half as many again), each as large as the widest window in it."""
    kinds = {}
    for each, number in counts.items():
        kinds[classes[each]] = kinds.get(classes[each], 0) + number
    sizes = [*kinds.values(), *([full] if full else [])]
    most = -(-length // block)
    pages = [min(-(-min(k.tokens - 1 + at_once, length) // block) + 1 + -(-k.sinks // block), most) for k in kinds]
    size = max(sizes) if max(sizes) < 1.5 * min(sizes) else min(sizes)
    total = sum(-(-n // size) * need for n, need in zip(sizes, [*pages, *([most] if full else [])], strict=True))
    return size * total


def test_classes_of_pages_hold_their_windows_and_need_little():
    counts, full = (
        {Window(1024, 4): 34, Window(512, 4): 12, Window(256, 4): 10, Window(64, 4): 6, Window(128, 4): 3},
        25,
    )
    classes = page_classes(counts, full, 32, 4096, 256)
    assert all(to.tokens >= each.tokens and to.sinks >= each.sinks for each, to in classes.items())
    found = reserved(counts, full, classes, 32, 4096, 256)
    together = dict.fromkeys(counts, Window(1024, 4))
    assert found < reserved(counts, full, together, 32, 4096, 256)
    alone = {each: each for each in counts}  # 32 block tables, where a few more pages need 11
    assert found < 1.05 * reserved(counts, full, alone, 32, 4096, 256)
    assert found < 0.51 * 90 * 128


def test_without_full_groups_and_with_one_window():
    assert page_classes({Window(64, 4): 3}, 0, 32, 256, 64) == {Window(64, 4): Window(64, 4)}
    assert page_classes({}, 5, 32, 256, 64) == {}


def test_room_of_pages_is_what_the_engine_reserved():
    """Of a Gemma with two full layers of six, texts of 256 tokens, and 1 GiB: 161,319 tokens in vLLM 0.32, and 159,780
    if pages of two sources were wide."""
    told, slots = (32, 256, 2048), 32 * 4 * 32 * 4  # bytes of keys, or values, in a page: tokens, heads, size, float32
    base = [(40, 2.0), (40, 2.0), (None, 2.0)] * 2
    wide = [(40, 3.0), (None, 3.0), (40, 2.0), (40, 2.0)]
    for layers, tokens in ((base, 161_319), (wide, 159_780)):
        assert 2**30 / (room(layers, *told) * slots) * 256 == pytest.approx(tokens, rel=0.001)


def test_room_of_layers_that_are_all_alike_is_that_of_their_pages():
    told = 32, 256, 2048
    assert room([(None, 3.0), (None, 2.0)], *told) == 8 * 5
    assert room([(40, 3.0), (40, 2.0)], *told) == 8 * 5
    assert room([(None, 1.5), (None, 2.0)], *told) == 8 * 3.5


def test_layers_that_borrow_as_a_whole():
    described = plan(
        {"3": span(2), "4": {**span(2), "1": {"share": [[2, 3], [2, 2]]}}, "5": {"0": span(2)["0"]}, "6": "drop"}
    )
    assert borrowed_of(described, 2) == {3: 2}
    assert gone_of(described) == {6}


@pytest.mark.parametrize(
    ("heads", "found"),
    [
        ([[2, 0], [2, 1]], None),
        ([[2, 3], [1, 2]], 3),  # two layers
        ([[2, 1], [2, 2]], 3),  # two KV groups
        ([None, [2, 1]], 3),  # its own and another
    ],
)
def test_heads_of_a_group_that_read_different_keys(heads, found):
    assert scattered(plan({"3": {"0": {"share": heads}}})) == found
