"""Half precision under a fused kernel: no less exact than that kernel, in both forms of sharing, padded or cached."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from sa_convert.families.table import FAMILIES
from support.converted_folder import convert_tiny

# Families whose queries and keys have biases: rotary and not, separate and fused, decoders and encoders.
BIASED = ("qwen2", "starcoder2", "phi", "opt", "gpt2", "bert")
HEAD_SIZE = 8
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e10}}
# What is added: products of queries and keys exceed what float16 holds, or lose in bfloat16 what tells tokens apart.
OFFSETS = [(torch.float16, 300.0), (torch.bfloat16, 50.0)]


def with_offsets(family, size):
    """Gives queries and keys a large common part, as biases of Qwen 2 do. It cancels in exact arithmetic."""
    entry = FAMILIES[family]

    def shift(bias):
        # The pair that turns slowest where positions rotate, else any.
        bias.view(-1, HEAD_SIZE)[:, [HEAD_SIZE // 2 - 1, HEAD_SIZE - 1]] += size

    def change(folder):
        for file in sorted(folder.glob("*.safetensors")):
            tensors = load_file(file)
            for name, tensor in tensors.items():
                part = name.removesuffix(".bias").rpartition(".")[2]
                if name.endswith(".bias") and part in (entry.modules.query, entry.modules.key):
                    shift(tensor)
                elif name.endswith(".bias") and part == entry.modules.fused:
                    shift(tensor[: tensor.shape[0] * 2 // 3])
            save_file(tensors, file, {"format": "pt"})

    return change


def divergence(exact, found):
    """Mean KL divergence from the exact predictions, in nats."""
    p, q = exact.float().log_softmax(-1), found.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def logits(model, ids, mask):
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits[mask.bool()]


@pytest.mark.parametrize(("dtype", "size"), OFFSETS, ids=str)
@pytest.mark.parametrize("family", BIASED)
def test_large_biases(tmp_path, family, dtype, size):
    rope = ROPE if FAMILIES[family].modules.rotary != "none" else {}
    case = convert_tiny(tmp_path, family, "heads", change=with_offsets(family, size), **rope)
    ids = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    base = type(case.base).from_pretrained(case.base_folder, attn_implementation="sdpa", dtype=torch.float32).eval()
    model = case.load(attn_implementation="sdpa", dtype=torch.float32)
    exact, ours = logits(base, ids, mask), logits(model, ids, mask)
    allowed = 3 * divergence(exact, logits(base.to(dtype), ids, mask)) + 1e-3
    model = model.to(dtype)
    for form in ("auto", "weights", "queries"):
        model.config.shared_attention["form"] = form
        assert divergence(ours, logits(model, ids, mask)) <= allowed, form


@pytest.mark.parametrize("family", BIASED[:-1])
def test_steps_with_caches_give_the_tokens_of_the_whole(tmp_path, family):
    """Decoding takes the weights form; dynamic and static caches, and padding on the left."""
    rope = ROPE if FAMILIES[family].modules.rotary != "none" else {}
    case = convert_tiny(tmp_path, family, "heads", change=with_offsets(family, 300.0), **rope)
    model = case.load(attn_implementation="sdpa", dtype=torch.float16)
    model.config.shared_attention["form"] = "auto"
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    whole = model.generate(ids, use_cache=False, **options)
    for cache in ({}, {"cache_implementation": "static"}):
        steps = model.generate(ids, **options, **cache)
        for wanted, found in zip(whole.logits[:1], steps.logits[:1], strict=True):
            assert divergence(wanted, found) < 0.02
        assert all(step.isfinite().all() for step in steps.logits)


@pytest.mark.parametrize("family", ["llama", "t5", "bart", "gpt_neox"])
def test_a_row_of_nothing_to_see_stays_finite(tmp_path, family):
    """Left padding: the least number of float16 and a low score, or a bias, add up to -inf for a whole row."""
    case = convert_tiny(tmp_path, family, "heads")
    model = case.load(attn_implementation="sdpa", dtype=torch.float16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_attention_bias" in name:
                parameter.fill_(-40.0)
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    inputs = (
        {"decoder_input_ids": ids.flip(1), "decoder_attention_mask": mask} if FAMILIES[family].encoder_decoder else {}
    )
    for form in ("weights", "queries"):
        model.config.shared_attention["form"] = form
        with torch.no_grad():
            assert model(ids, attention_mask=mask, **inputs).logits[mask.bool()].isfinite().all()
