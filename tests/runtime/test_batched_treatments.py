"""Continuous batching (`generate_batch`) of treatments besides sharing: the tokens of `generate`."""

import json
import logging

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import continuous_api
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

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


def borrowing(folder):
    """A layer whose heads all borrow."""
    layer = geometry_of_folder(folder).layers[3]
    return {3: {group: {"share": [[2, head] for head in layer.heads_of(group)]} for group in range(layer.groups)}}


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
    "a layer that borrows": lambda root: converted(root, "llama", borrowing),
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


OPTIONS = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def alone(model):
    """What `generate` makes of each prompt."""
    return [model.generate(torch.tensor([prompt]), **OPTIONS)[0, len(prompt) :].tolist() for prompt in PROMPTS]


def batched(model):
    """What `generate_batch` makes of them. Small pages and batches: prompts are split, and wait for each other."""
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    outputs = model.generate_batch(
        inputs=PROMPTS,
        generation_config=GenerationConfig(**{**OPTIONS, "eos_token_id": -1}),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, page_size=32, max_batch_tokens=16),
        progress_bar=False,
    ).values()
    assert [output.error for output in outputs] == [None] * len(PROMPTS)
    found = {tuple(output.prompt_ids): list(output.generated_tokens) for output in outputs}
    return [found[tuple(prompt)] for prompt in PROMPTS]


BASE_CANNOT = [("windows and learned sinks", "sdpa")]


@pytest.mark.parametrize(
    ("case", "kernel"),
    [(case, kernel) for case in CASES for kernel in ("sdpa", "eager") if (case, kernel) not in BASE_CANNOT],
)
def test_generates_the_tokens_of_generate(tmp_path, case, kernel):
    model = load_converted(CASES[case](tmp_path), attn_implementation=kernel, dtype=torch.float32)
    wanted = alone(model)
    assert len({token for tokens in wanted for token in tokens}) > 3
    assert batched(model) == wanted


def earlier(self, hidden_states, position_embeddings, attention_mask, **kwargs):
    """The forward of `LlamaAttention` in 5.19, which hands the cache of continuous batching on among its keywords."""
    shape = hidden_states.shape[:-1]
    query, key, value = (
        projection(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
        for projection in (self.q_proj, self.k_proj, self.v_proj)
    )
    query, key = modeling_llama.apply_rotary_pos_emb(query, key, *position_embeddings)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
    output, weights = function(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
    return self.o_proj(output.reshape(*shape, -1)), weights


def writing(module, query, key, value, attention_mask, cache=None, then=ALL_ATTENTION_FUNCTIONS["sdpa"], **kwargs):
    """SDPA as it was in 5.19."""
    if cache is not None:
        key, value = cache.update(key, value, module.layer_idx, kwargs=kwargs)
    return then(module, query, key, value, attention_mask, **kwargs)


OF_LLAMA = ["a layer that borrows", "windows", "windows and sharing", "low rank", "drop"]


@pytest.mark.parametrize("case", OF_LLAMA)
def test_pages_that_the_attention_function_writes(tmp_path, monkeypatch, case):
    """So it was until 5.23. Played with the library of today."""
    model = load_converted(CASES[case](tmp_path), attn_implementation="sdpa", dtype=torch.float32)
    wanted = alone(model)
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", earlier)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", writing)
    assert batched(model) == wanted


def test_flash_attention_is_refused_before_anything_runs(tmp_path):
    model = load_converted(CASES["a layer that borrows"](tmp_path), dtype=torch.float32)
    model.config._attn_implementation_internal = "flash_attention_2"  # as if it were installed
    with pytest.raises(NotImplementedError, match="load this model with attn_implementation='sdpa'"):
        batched(model)


@pytest.mark.parametrize(("case", "chosen"), [("a layer that borrows", "sdpa"), ("drop", "flash_attention_3")])
def test_flash_attention_is_not_chosen_unasked(tmp_path, monkeypatch, case, chosen):
    """A plan that drops layers, and no more, may have it."""
    model = load_converted(CASES[case](tmp_path), dtype=torch.float32)
    monkeypatch.setattr(continuous_api, "is_flash_attn_3_available", lambda **_: True)
    asked = []
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda _, name: asked.append(name))
    model.init_continuous_batching()
    assert (asked or [model.config._attn_implementation]) == [chosen]


def test_windows_without_a_mask_are_refused(tmp_path):
    """Flash attention tells texts apart by their lengths, and is given no mask."""
    model = load_converted(converted(tmp_path, "llama", windows))
    module, states = model.model.layers[1].self_attn, torch.zeros(1, 8, 3, 16)
    exchange = code_of(model, "modeling_shared_attention").Exchange(model.model, {"cache": PagedAttentionCache()})
    with pytest.raises(NotImplementedError, match="layer 1 has windows, which need a mask in continuous batching"):
        module.attend(states, states[:, :4], states[:, :4], None, {"scaling": 1.0}, exchange)


class PagedAttentionCache:
    """Known by its name alone, as that of transformers is."""
