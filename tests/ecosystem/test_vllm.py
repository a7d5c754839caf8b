"""Converted models in vLLM, with the plugin of plugins/sa-convert-vllm and without it.

These tests need an environment with vLLM and the plugin: `make test-engines` makes it, names its Python in
SA_CONVERT_ENGINES, and runs them. All jobs of a kind run in one process, since an engine takes long to start.
"""

import json

import pytest

from support.engines import convert_tiny, generated, job, random_prompts, serve

pytestmark = [pytest.mark.engines, pytest.mark.timeout(3600)]

PROMPTS = [random_prompts((7, 40, 60, 100))]
FAMILIES = ("llama", "mistral", "qwen3", "gemma3_text")


def window(sinks, tokens):
    return {"window": {"sinks": sinks, "tokens": tokens}}


def span(source, groups=4, size=2):
    return {g: {"share": [[source, g * size + k] for k in range(size)]} for g in range(groups)}


# One layer has full KV groups and two windows, one has a window for all, one has a window without sinks.
WINDOWS = {
    0: {0: window(4, 32), 2: window(4, 16)},
    2: {group: window(4, 64) for group in range(4)},
    3: {1: window(0, 24), 2: window(4, 48), 3: window(4, 48)},
}
SPANS = {"gemma3_text": {1: span(0), 4: span(3), 5: span(2)}}
PLANS = {
    "window": WINDOWS,
    "groups": {3: {0: {"share": [[2, 2], [2, 3]]}, 1: {"share": [[2, 0], [2, 1]]}}},
    "heads": {3: {0: {"share": [[2, 2], [1, 3]]}}},
    "drop": {3: "drop"},
    "linear": {3: "linear"},
    "both": {0: {0: window(4, 32)}, 3: span(2)},
    "keys": {3: {group: {"low_rank": {"keys": 16}} for group in range(4)}},
    "values": {3: {group: {"low_rank": {"values": 16}} for group in range(4)}},
    "windows and values": {0: {0: window(4, 32)}, 3: {group: {"low_rank": {"values": 16}} for group in range(4)}},
    "some": {1: span(0), 5: span(2)},
}
OTHERS = ("groups", "drop", "linear", "both", "keys", "values", "windows and values")

FULL, SLIDING = "full_attention", "sliding_attention"
STOCK = {
    "llama": {"attention_bias": False},
    "qwen2": {"layer_types": [FULL] * 6},
    "qwen3": {"layer_types": [FULL] * 6},
    "smollm3": {"layer_types": [FULL] * 6},
    "gemma2": {"layer_types": [FULL, SLIDING] * 3, "sliding_window": 40, "query_pre_attn_scalar": 32},
}
"""Families with a class that vLLM knows, which is told of windows, and what their bases need."""


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    root = tmp_path_factory.mktemp("engines")

    def folder(family, name):
        if name == "base":
            return folder(family, "window").with_name(f"{family}-base")
        plan = SPANS.get(family, {3: span(2), 4: span(2)}) if name == "span" else PLANS[name]
        return convert_tiny(root, family, name, plan)

    return folder


@pytest.fixture(scope="module")
def stock_of(tmp_path_factory):
    """Folders without code, of a family, and what vLLM has to be told."""
    root, told = tmp_path_factory.mktemp("stock"), {layer: {g: window(0, 40) for g in range(4)} for layer in (2, 4)}

    def stock(family):
        out = convert_tiny(root, family, "stock", told, engine="vllm", **STOCK[family])
        assert not list(out.glob("*.py"))
        asked = json.loads((out / "report.json").read_text())["for"].get("options", "")
        return out, {"model_impl": "transformers"} if "--model-impl transformers" in asked else {}

    return stock


COMMON, *ENDS = random_prompts((140, 9, 11, 11, 11), seed=1)
PREFIXES = [[COMMON + ENDS[0]], [COMMON + more for more in ENDS[1:]]]
CROWD = [random_prompts([100] * 12, seed=2)]


@pytest.fixture(scope="module")
def served(folder_of):
    """With the plugin."""
    jobs = {
        f"{family} {name}": job(folder_of(family, name), PROMPTS) for family in FAMILIES for name in ("window", "span")
    }
    jobs |= {f"{family} base": job(folder_of(family, "base"), PROMPTS) for family in FAMILIES}
    jobs["gemma3_text some"] = job(folder_of("gemma3_text", "some"), PROMPTS)
    jobs |= {f"llama {name}": job(folder_of("llama", name), PROMPTS) for name in (*OTHERS, "heads")}
    windows = folder_of("llama", "window")
    for name, blocks in (("window", 90), ("span", 24)):
        folder = folder_of("llama", name)
        jobs[f"{name} prefixes"] = job(folder, PREFIXES, max_num_batched_tokens=32)
        jobs[f"{name} crowd"] = job(folder, CROWD, new=60, num_gpu_blocks_override=blocks)
        jobs[f"{name} compiled"] = job(folder, PROMPTS, enforce_eager=False)
    jobs["short steps"] = job(folder_of("llama", "base"), PROMPTS, max_num_batched_tokens=32)
    jobs["fp8"] = job(windows, PROMPTS, kv_cache_dtype="fp8")
    jobs["one manager"] = job(windows, PROMPTS, disable_hybrid_kv_cache_manager=True)
    return serve(jobs)


@pytest.fixture(scope="module")
def unplugged(folder_of):
    """By vLLM alone."""
    names = ("base", "span", "groups", "heads", "window", "drop", "linear", "keys", "values")
    return serve({name: job(folder_of("llama", name), PROMPTS) for name in names}, plugins="none")


@pytest.fixture(scope="module")
def stock(stock_of):
    """Folders without code, and their bases, by vLLM alone."""
    jobs = {}
    for family in STOCK:
        out, options = stock_of(family)
        jobs[family] = job(out, PROMPTS, max_num_batched_tokens=32, **options)
        base = out.with_name(f"{family}-base-changed")
        jobs[f"{family} base"] = job(base, PROMPTS, max_num_batched_tokens=32, **options)
    return serve(jobs, plugins="none")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["window", "span"])
def test_same_tokens(served, folder_of, family, name):
    expected = generated(folder_of(family, name), PROMPTS)
    assert served[f"{family} {name}"].get("tokens") == expected, served[f"{family} {name}"]
    assert expected != served[f"{family} base"]["tokens"]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_borrow_make_room(served, family):
    assert served[f"{family} span"]["cache_tokens"] > served[f"{family} base"]["cache_tokens"]


def test_where_wide_pages_would_need_more_than_they_save_there_are_none(served, folder_of):
    """Gemma has windows of its own, so all its pages have one size; and here only some layers are sources."""
    found = served["gemma3_text some"]
    assert found.get("tokens") == generated(folder_of("gemma3_text", "some"), PROMPTS), found
    assert found["cache_tokens"] == served["gemma3_text base"]["cache_tokens"]


def test_how_much_room_they_make(served):
    """Two of six layers keep values alone: 10 numbers of 12."""
    found = served["llama span"]["cache_tokens"] / served["llama base"]["cache_tokens"]
    assert found == pytest.approx(12 / 10, rel=0.01)


def test_windows_make_room(served):
    """Beside a window vLLM reserves the tokens of a step, so the steps of this engine are short."""
    assert served["window prefixes"]["cache_tokens"] > 1.1 * served["short steps"]["cache_tokens"]


@pytest.mark.parametrize("name", OTHERS)
def test_other_plans(served, folder_of, name):
    assert served[f"llama {name}"].get("tokens") == generated(folder_of("llama", name), PROMPTS), served[
        f"llama {name}"
    ]


def test_a_layer_without_attention_has_no_pages(served):
    for name in ("drop", "linear"):
        found = served[f"llama {name}"]["cache_tokens"] / served["llama base"]["cache_tokens"]
        assert found == pytest.approx(6 / 5, rel=0.01)


def test_values_of_low_rank_make_room(served):
    """One of six layers has 16 + 32 numbers for each head instead of 64."""
    found = served["llama values"]["cache_tokens"] / served["llama base"]["cache_tokens"]
    assert found == pytest.approx(6 * 64 / (5 * 64 + 48), rel=0.01)


@pytest.mark.parametrize("family", STOCK)
def test_folders_without_code(stock, stock_of, family):
    expected = generated(stock_of(family)[0], PROMPTS)
    assert stock[family].get("tokens") == expected, stock[family]
    assert expected != stock[f"{family} base"]["tokens"]
    assert stock[family]["cache_tokens"] > 1.05 * stock[f"{family} base"]["cache_tokens"]


@pytest.mark.parametrize("name", ["window", "span"])
def test_prompts_in_pieces_and_prefixes_from_the_cache(served, folder_of, name):
    found = served[f"{name} prefixes"]
    assert found.get("tokens") == generated(folder_of("llama", name), PREFIXES), found
    assert found["prefix_cache_hits"] >= 3 * 128


@pytest.mark.parametrize("name", ["window", "span"])
def test_requests_that_give_way_to_others(served, folder_of, name):
    found = served[f"{name} crowd"]
    assert found.get("tokens") == generated(folder_of("llama", name), CROWD, new=60), found
    assert found["num_preemptions"] > 0


@pytest.mark.parametrize("name", ["window", "span"])
def test_compiled(served, folder_of, name):
    assert served[f"{name} compiled"].get("tokens") == generated(folder_of("llama", name), PROMPTS)


def of_two(folder, plugins=None):
    """By two processes, each with half of the heads."""
    ranks = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    return serve({"two": job(folder, PROMPTS, tensor_parallel_size=2)}, plugins, environment=ranks)["two"]


@pytest.mark.parametrize("name", ["window", "span"])
def test_two_ranks(folder_of, name):
    found = of_two(folder_of("llama", name))
    assert found.get("tokens") == generated(folder_of("llama", name), PROMPTS), found


@pytest.mark.parametrize(("name", "plugins"), [("groups", None), ("values", None), ("groups", "none")])
def test_what_cannot_be_divided_among_ranks_is_refused(folder_of, name, plugins):
    found = of_two(folder_of("llama", name), plugins)
    reason = "ranks cannot divide this plan" if plugins else "this plan cannot be divided among ranks"
    assert reason in found.get("log", ""), found
    assert "without tensor parallelism" in found["log"]


def test_two_ranks_without_the_plugin(folder_of):
    found = of_two(folder_of("llama", "span"), "none")
    assert found.get("tokens") == generated(folder_of("llama", "span"), PROMPTS), found


@pytest.mark.parametrize("name", ["span", "groups", "drop", "linear", "keys", "values"])
def test_without_the_plugin_nothing_is_saved_and_tokens_are_the_same(unplugged, folder_of, name):
    assert unplugged[name].get("tokens") == generated(folder_of("llama", name), PROMPTS), unplugged[name]
    assert unplugged[name]["cache_tokens"] == unplugged["base"]["cache_tokens"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama heads", "heads of one KV group of layer 3 reuse heads with different keys"),
        ("fp8", "pages of fp8"),
        ("one manager", "without the hybrid KV cache manager"),
    ],
)
def test_refused(served, name, reason):
    assert reason in served[name].get("error", ""), served[name]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("heads", "heads of one KV group of layer 3 have different keys"),
        ("window", "layer 0 has windows of its KV groups"),
    ],
)
def test_refused_without_the_plugin(unplugged, name, reason):
    assert reason in unplugged[name].get("error", ""), unplugged[name]
