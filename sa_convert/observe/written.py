"""Calibration text that the model writes itself: it needs no data, and covers what it knows."""

import math
import time
from typing import Any

import torch

from sa_convert.console.progress import progress
from sa_convert.observe.finite import not_finite

OPENINGS = (
    "The government said on", "Once upon a time", "In a statement released", "Abstract", "Dear Sir or Madam,",
    "Chapter 1", "Police in", "How to make", "The history of", "A new study", "# Introduction", "Scientists have",
    "The team won", "Q: What is", "I remember", "The company announced", "According to", "In the early 19th century",
    "She looked at", "The following article", "Breaking news:", "My favourite", "The president", "\"I don't know,\" he",
    "Introduction to", "The market", "Recipe:", "Born in", "During the war", "Patients with", "The river", "Let us",
)  # fmt: skip
"""Openings of many kinds of text, so that not all samples fall into the model's favourite register."""

PASSAGES = 3
"""Passages in one sequence, each with another opening; more, if they would have more than LONGEST tokens."""

LONGEST = 256
"""Tokens of a passage, at the most. Every token reads all before it, so long passages take longer a token."""

TEMPERATURE = 0.9

BATCH = 48


def written_by(
    model: Any, tokenizer: Any, sequences: int, length: int, seed: int = 0, seconds: float = math.inf
) -> torch.Tensor:
    """Tokens (sequences, length), int64, sampled from the model; each row holds at least PASSAGES passages.

    The same model, arguments and number of threads give the same tokens. seconds: if these do not do, there are fewer
    sequences, but no fewer than two. Raises CheckpointError if the model's activations are not finite.
    """
    from transformers import GenerationConfig

    passages = max(PASSAGES, -(-length // LONGEST))
    size = max(-(-length // passages), 3)
    count = sequences * passages
    openings = [tokenizer(text)["input_ids"][:2] for text in OPENINGS]
    width = max(len(ids) for ids in openings)
    openings = [ids for ids in openings if len(ids) == width] or [openings[0]]
    prompts = torch.tensor([openings[at % len(openings)] for at in range(count)])
    if not bool(torch.isfinite(model(input_ids=prompts[:1].to(model.device)).logits).all()):
        raise not_finite(model)
    preferred, model.generation_config = model.generation_config, GenerationConfig(pad_token_id=0)
    rows, begun = [], time.monotonic()
    try:
        with (
            torch.random.fork_rng(),
            torch.inference_mode(),
            progress(-(-count // BATCH) * (size - width), "the model writes calibration text", unit="tok") as bar,
        ):
            torch.manual_seed(seed)
            for chunk in prompts.split(BATCH):
                chunk = chunk.to(model.device)
                rows.append(
                    model.generate(
                        chunk,
                        attention_mask=torch.ones_like(chunk),
                        max_new_tokens=size - width,
                        do_sample=True,
                        temperature=TEMPERATURE,
                        top_k=0,
                        top_p=1.0,
                        use_cache=True,
                        streamer=None,
                    ).cpu()
                )
                bar.update(size - width)
                each = (time.monotonic() - begun) / len(rows)
                if len(rows) * BATCH >= 2 * passages and each * (len(rows) + 1) > seconds:
                    break
    finally:
        model.generation_config = preferred
    made = torch.cat(rows)
    made = made[: len(made) // passages * passages]
    return made.reshape(-1, passages * size)[:, :length].clone()
