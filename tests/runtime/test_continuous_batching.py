"""Continuous batching (`generate_batch`, behind serving engines of transformers): the tokens of `generate`."""

import logging

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from support.converted_folder import convert_tiny

PROMPTS = [[3, 9, 27, 81, 16, 48, 17], [5, 25, 125], [7, 49, 87, 96, 33, 101, 64, 90, 11, 77, 20, 31]]
NEW = 8
CASES = [
    ("llama", "span"),
    ("llama", "groups"),
    ("llama", "heads"),
    ("qwen3", "heads"),
    ("mistral", "groups"),  # windows
    ("gemma3_text", "heads"),  # windows and full attention
    ("qwen2_moe", "heads"),  # our own forward
    ("gpt2", "heads"),  # a fused projection
    ("persimmon", "groups"),
    ("mixtral", "layers"),
]


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "kind"), CASES, ids=lambda value: value)
def test_generates_the_tokens_of_generate(tmp_path, family, kind, kernel):
    model = convert_tiny(tmp_path, family, kind).load(attn_implementation=kernel, dtype=torch.float32)
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
