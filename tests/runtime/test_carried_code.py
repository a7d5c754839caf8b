"""What a converted model carries: the files that one function names, and no more than an auditor can read."""

import ast
import importlib.util
import json

import pytest

from sa_convert.families.model_classes import model_classes_of
from sa_convert.families.table import FAMILIES
from sa_convert.plan.audited import expected_code
from sa_convert.rewrite.carried import carried_files
from support.converted_folder import convert_tiny
from support.processes import ROOT

# One of each kind: their own forward, with norms by row, sinks, experts, mixed layers, a text model within another; our
# forward, with fused, gated and grouped projections; exchanges beside positions and by thread; encoder-decoders.
OWN = ["llama", "cohere", "gpt_oss", "mixtral", "lfm2", "gemma3", "olmo2"]
SPECIAL = ["gpt2", "qwen3_next", "stablelm", "bert", "falcon", "bloom", "gptj", "bart", "t5"]
LIMITS = {
    **{"share": (3, 850), "window": (4, 1505), "low_rank": (3, 909), "merge": (3, 634), "linear": (4, 700)},
    **{"drop": (4, 698), "window share": (5, 1755), "window low_rank share merge linear drop": (10, 2211)},
}
"""Files of families that run their own forward, and lines of code (no blank lines, comments, docstrings)."""

SPECIAL_LIMIT = (1, 430)
"""What is carried besides by families that need attention code of ours."""


@pytest.mark.parametrize("model_type", OWN + SPECIAL)
def test_a_folder_carries_what_one_function_says(model_type, tmp_path):
    folder = convert_tiny(tmp_path, model_type, "span").folder
    expected = expected_code(json.loads((folder / "config.json").read_text()))
    assert {path.name: path.read_bytes() for path in folder.rglob("*.py")} == expected
    assert ("shared_attention_special.py" in expected) == (model_type in SPECIAL)


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("carried", ROOT / "docs" / "benchmarks" / "carried.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("treatments", LIMITS)
def test_it_is_little(treatments, benchmark):
    for model_type, family in FAMILIES.items():
        files, _, lines = benchmark.carried(model_type, tuple(treatments.split()))
        more_files, more_lines = SPECIAL_LIMIT if family.modules.special_class else (0, 0)
        assert files <= LIMITS[treatments][0] + more_files, model_type
        assert lines <= LIMITS[treatments][1] + more_lines, model_type


def test_the_page_has_today_s_numbers(benchmark):
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    for shown in benchmark.SHOWN:
        assert benchmark.row(*shown) in page


def test_what_carried_code_does_without():
    """Its classes are named by literal lines, and nothing private of transformers is imported."""
    from sa_convert.treatments.registry import runtime_files

    for model_type in ("llama", "t5"):
        family = FAMILIES[model_type]
        files = carried_files(family, runtime_files(), model_classes_of(family, family.default_class).values())
        for name, content in files.items():
            tree = ast.parse(content)
            top = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
            assert "__getattr__" not in top, name
            modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
            modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
            assert {str(module).partition(".")[0] for module in modules} <= {
                *("torch", "transformers", "sys", "threading"),
                *("contextlib", "dataclasses", "functools", "inspect", "itertools", "types", "typing"),
            }, name
            assert not any(part.startswith("_") for module in modules for part in str(module).split("."))
    assert b"class SharedAttentionT5EncoderModel(_Treated" in files["modeling_shared_attention.py"]


def test_a_configuration_tells_code_apart():
    """transformers keeps the model class of a configuration class, which it knows by the bytes of its file."""
    from sa_convert.treatments.registry import runtime_files

    made = [carried_files(FAMILIES["llama"], treatments, ["LlamaModel"]) for treatments in ({}, runtime_files())]
    assert made[0]["modeling_shared_attention.py"] != made[1]["modeling_shared_attention.py"]
    assert made[0]["configuration_shared_attention.py"] != made[1]["configuration_shared_attention.py"]
