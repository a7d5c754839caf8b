"""Continuous batching (`generate_batch`) of treatments besides sharing: the tokens of `generate`."""

import json
import logging

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from sa_convert.jobs.converting import ConvertOptions, convert
from sa_convert.plan.recipe_file import parse_recipe
from support import low_rank_models
from support.tiny_models import code_of, geometry_of_folder, load_converted, save_tiny, save_tokenizer

PROMPTS = [
    [3, 9, 27, 81, 16, 48, 17],
    [5, 25, 125],
    [7, 49, 87, 96, 33, 101, 64, 90, 11, 77, 20, 31, 8, 60, 44, 99, 12, 13, 71, 55],
]
NEW = 12


def windows(folder, layers=(1, 3), sinks=2):
    """Windows of 4 and 7 tokens in these layers, in all KV groups but the last."""
    geometry = geometry_of_folder(folder)
    return {
        layer: {
            group: {"window": {"sinks": sinks, "tokens": 4 + 3 * (group % 2)}}
            for group in range(max(1, geometry.layers[layer].groups - 1))
        }
        for layer in layers
    }


def converted(root, family, plan_of, **changes):
    save_tiny(family, root / "base", **changes)
    save_tokenizer(root / "base")
    lines = [
        f"  {layer}: {told if isinstance(told, str) else json.dumps(told)}"
        for layer, told in plan_of(root / "base").items()
    ]
    text = "\n".join(["plan:", *lines])
    for group in range(8):
        text = text.replace(f'"{group}":', f"{group}:")
    recipe = parse_recipe(text, "r.yaml")
    convert(str(root / "base"), recipe, root / "out", ConvertOptions(validate=False, device="cpu"))
    return root / "out"


def low_rank(root, family, more=None):
    return low_rank_models.convert(root, family, {1: {0: 6, 1: 4}, 3: {1: 8}}, more).folder


CASES = {
    "windows": lambda root: converted(root, "llama", windows),
    "windows without sinks": lambda root: converted(root, "llama", lambda base: windows(base, sinks=0)),
    "windows beside own windows": lambda root: converted(
        root, "gemma3_text", lambda base: windows(base, layers=(0, 1, 2, 3, 4, 5), sinks=0)
    ),
    "windows and learned sinks": lambda root: converted(root, "gpt_oss", lambda base: windows(base, layers=(1, 2, 3))),
    "windows and sharing": lambda root: converted(
        root,
        "llama",
        lambda base: {**windows(base, layers=(1,)), 3: {0: {"share": [[2, 1], [2, 0]]}, 1: windows(base)[3][1]}},
    ),
    "low rank": lambda root: low_rank(root, "llama"),
    "low rank and norms of keys": lambda root: low_rank(root, "qwen3"),
    "low rank and windows": lambda root: low_rank(root, "qwen3", {1: {2: {"window": {"sinks": 1, "tokens": 5}}}}),
    "drop": lambda root: converted(root, "llama", lambda base: {2: "drop", 5: "drop"}),
    "merge": lambda root: converted(root, "llama", lambda base: {2: "merge", 5: "{merge: {groups: 2}}"}),
    "merge and windows": lambda root: converted(root, "llama", lambda base: {**windows(base), 2: "merge", 5: "merge"}),
}


BASE_CANNOT = [("windows and learned sinks", "sdpa")]


@pytest.mark.parametrize(
    ("case", "kernel"),
    [(case, kernel) for case in CASES for kernel in ("sdpa", "eager") if (case, kernel) not in BASE_CANNOT],
)
def test_generates_the_tokens_of_generate(tmp_path, case, kernel):
    model = load_converted(CASES[case](tmp_path), attn_implementation=kernel, dtype=torch.float32)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = [model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in PROMPTS]
    assert len({token for tokens in wanted for token in tokens}) > 3
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    outputs = model.generate_batch(
        inputs=PROMPTS,
        generation_config=GenerationConfig(**{**options, "eos_token_id": -1}),
        # Small pages and batches: prompts are split, and requests wait for each other.
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, page_size=32, max_batch_tokens=16),
        progress_bar=False,
    ).values()
    assert [output.error for output in outputs] == [None] * len(PROMPTS)
    found = {tuple(output.prompt_ids): list(output.generated_tokens) for output in outputs}
    assert [found[tuple(prompt)] for prompt in PROMPTS] == wanted


def test_windows_without_a_mask_are_refused(tmp_path):
    """Flash attention tells texts apart by their lengths, and is given no mask."""
    model = load_converted(converted(tmp_path, "llama", windows))
    module, states = model.model.layers[1].self_attn, torch.zeros(1, 8, 3, 16)
    exchange = code_of(model, "modeling_shared_attention").Exchange(model.model, {"cache": PagedAttentionCache()})
    with pytest.raises(NotImplementedError, match="layer 1 has windows, which need a mask in continuous batching"):
        module.attend(states, states[:, :4], states[:, :4], None, {"scaling": 1.0}, exchange)


class PagedAttentionCache:
    """Known by its name alone, as that of transformers is."""
