"""Converted models as ONNX and ExecuTorch programs, by the exporters of transformers.

These tests need an environment with the exporters' packages: `make test-engines` makes it, names its Python in
SA_CONVERT_EXPORTS, and runs them. What is exported is the code of the folder, without sa_convert.
"""

import os

import pytest

from support.engines import convert_tiny, export, generated

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1800)]


def span(source):
    return {g: {"share": [[source, 2 * g], [source, 2 * g + 1]]} for g in range(4)}


def window(sinks, tokens):
    return {"window": {"sinks": sinks, "tokens": tokens}}


def low_rank(**ranks):
    return {group: {"low_rank": ranks} for group in range(4)}


PLANS = {
    "span": {3: span(2), 4: span(2)},
    "heads": {3: {0: {"share": [[2, 2], [1, 3]]}, 2: {"share": [None, [0, 1]]}}, 5: {3: {"share": [[4, 6], [4, 7]]}}},
    "keys": {3: low_rank(keys=16)},
    "values": {2: low_rank(values=16)},
    "both": {3: low_rank(keys=8, values=16)},
}
# Texts are longer than every window. The layer with sinks has KV groups without a window beside it.
PASSES = {
    "span": PLANS["span"],
    "window": {1: {0: window(4, 16), 2: window(4, 8)}, 3: {group: window(0, 12) for group in range(4)}},
    "drop": {3: "drop"},
    "linear": {3: "linear"},
}
"""Those that are exported without a cache. A decoding step of the last three is none that the exporters can write: they
look up the classes of a cache's layers by their names, and ours have none."""
SAMPLE, LONGER, OTHER = list(range(3, 35)), list(range(5, 53)), list(range(40, 72))
NEW = 8


def job(folder, form, kind):
    prompts = [LONGER if form == "onnx" else OTHER]
    return {"folder": str(folder), "format": form, "kind": kind, "sample": SAMPLE, "prompts": prompts, "new": NEW}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("exports")
    return {name: convert_tiny(root, "llama", name, plan) for name, plan in {**PLANS, **PASSES}.items()}


@pytest.fixture(scope="module")
def exported(folders):
    if "SA_CONVERT_EXPORTS" not in os.environ:
        pytest.skip("SA_CONVERT_EXPORTS names no Python with onnx, onnxscript, onnxruntime and executorch")
    forms = [(name, form, "generation") for name in PLANS for form in ("onnx", "executorch")]
    forms += [(name, form, "forward") for name in PASSES for form in ("onnx", "executorch")]
    return export({form: job(folders[form[0]], *form[1:]) for form in forms})


@pytest.mark.parametrize("form", ["onnx", "executorch"])
@pytest.mark.parametrize("name", PASSES)
def test_logits_of_a_forward_pass(exported, name, form):
    """ONNX: of another length than that of the sample."""
    found = exported[name, form, "forward"]
    assert found.get("off", 1) < 1e-4, found


@pytest.mark.parametrize("name", PLANS)
def test_onnx_generates_with_a_growing_cache(exported, folders, name):
    found = exported[name, "onnx", "generation"]
    assert max(found.get("off", {"": 1}).values()) < 1e-4, found
    assert [found["tokens"]] == generated(folders[name], [[LONGER]], NEW)[0]


@pytest.mark.parametrize("name", PLANS)
def test_executorch_generates_with_a_static_cache(exported, name):
    found = exported[name, "executorch", "generation"]
    assert max(found.get("off", {"": 1}).values()) < 1e-4, found


HELD = {
    "span": [256, 256, 256, 128, 128, 256],
    "heads": [256, 256, 256, 224, 256, 224],  # one KV group of four has no key of its own; another keeps one for a head
    "keys": [256, 256, 256, 192, 256, 256],
    "values": [256, 256, 192, 256, 256, 256],
    "both": [256, 256, 256, 96, 256, 256],
}
"""Numbers a token in each layer: 4 KV groups of 32 for keys, and as many for values, less what a plan saves."""


@pytest.mark.parametrize("form", ["onnx", "executorch"])
@pytest.mark.parametrize("name", HELD)
def test_the_cache_of_a_program_is_as_small_as_the_plan_says(exported, name, form):
    slots, length = exported[name, form, "generation"]["slots"], {"onnx": len(LONGER), "executorch": len(SAMPLE) + NEW}
    assert [sum(shape[-1] * shape[1] for shape in layer) for layer in slots] == HELD[name]
    assert all(max(shape[2] for shape in layer) == length[form] for layer in slots)
