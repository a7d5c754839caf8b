"""Models without attention, or with fewer KV groups, in some layers in vLLM's own class of Nemotron-NAS, told by their
config.json.

As in `test_vllm.py`, `make test-engines` makes the environment and runs this.
"""

import json

import pytest

from support.engines import SIZES, convert_tiny, generated, job, random_prompts, serve
from support.tiny_models import save_tiny, save_tokenizer

pytestmark = [pytest.mark.engines, pytest.mark.timeout(3600)]

PROMPTS = [random_prompts((7, 40, 60, 100))]
DROPPED = {2: "drop", 4: "drop"}
FAMILIES = {
    "llama": {},  # with biases in all four projections
    "mistral": {"attention_bias": False, "sliding_window": None},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, found = tmp_path_factory.mktemp("blocks"), {}
    for family, changes in FAMILIES.items():
        base = root / f"{family}-base"
        save_tiny(family, base, **SIZES, **changes)
        save_tokenizer(base)
        config = json.loads((base / "config.json").read_text())  # transformers does not save what is None
        (base / "config.json").write_text(json.dumps({**config, **changes}))
        found[family] = convert_tiny(root, family, "blocks", DROPPED, engine="vllm")
        found[f"{family} base"] = base
    return found


@pytest.fixture(scope="module")
def alone(folders):
    """By vLLM without a plugin."""
    jobs = {name: job(folder, PROMPTS) for name, folder in folders.items()}
    jobs["compiled"] = job(folders["llama"], PROMPTS, enforce_eager=False)
    jobs["not trusted"] = job(folders["llama"], PROMPTS, trust_remote_code=False)
    return serve(jobs, plugins="none")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_of_transformers_and_no_pages_for_layers_without_attention(alone, folders, family):
    assert alone[family].get("tokens") == generated(folders[family], PROMPTS), alone[family]
    assert alone[family]["tokens"] != alone[f"{family} base"]["tokens"]
    assert alone[family]["cache_tokens"] == pytest.approx(6 / 4 * alone[f"{family} base"]["cache_tokens"], rel=0.01)


def test_the_tokens_of_transformers_and_smaller_pages_for_layers_with_fewer_kv_groups(tmp_path):
    """One KV group of four is left in two layers, and two in a third; another one is dropped."""
    plan = {1: "merge", 2: "drop", 3: "merge", 4: {"merge": {"groups": 2}}}
    folder = convert_tiny(tmp_path, "llama", "merged", plan, engine="vllm")
    jobs = {"merged": job(folder, PROMPTS), "base": job(tmp_path / "llama-base", PROMPTS)}
    found = serve(jobs, plugins="none")
    assert found["merged"].get("tokens") == generated(folder, PROMPTS), found["merged"]
    assert found["merged"]["tokens"] != found["base"]["tokens"]
    kept = 4 + 1 + 0 + 1 + 2 + 4
    assert found["merged"]["cache_tokens"] == pytest.approx(24 / kept * found["base"]["cache_tokens"], rel=0.01)


def test_compiled_blocks(alone):
    assert alone["compiled"].get("tokens") == alone["llama"]["tokens"]


def test_without_trust_vllm_says_so(alone):
    """The configuration class is code, too."""
    assert "trust_remote_code=True" in alone["not trusted"].get("error", ""), alone["not trusted"]


def test_with_the_plugin_they_are_the_same(folders, alone):
    found = serve({"one": job(folders["llama"], PROMPTS)})["one"]
    assert found.get("tokens") == alone["llama"]["tokens"], found
    assert found["cache_tokens"] == alone["llama"]["cache_tokens"]


def test_blocks_on_two_ranks(folders, alone):
    ranks = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    found = serve({"two": job(folders["llama"], PROMPTS, tensor_parallel_size=2)}, "none", environment=ranks)["two"]
    assert found.get("tokens") == alone["llama"]["tokens"], found
