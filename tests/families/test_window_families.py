"""Windows in every family that caches: what the base computes if its scores are masked by their definition."""

import pytest
import torch

from sa_convert.errors import PlanError
from sa_convert.families.table import FAMILIES
from support.forced_rows import forced_rows
from support.planned_folders import convert_by_plan, told, windows_for
from support.tiny_models import VARIANTS, attentions_of, geometry_of_folder, load_converted, save_tiny

CACHING = [name for name, entry in FAMILIES.items() if any(each.caches and not each.cross for each in entry.all_stacks)]
CASES = [(family, None) for family in CACHING]
CASES += [(family, at) for family, options in VARIANTS.items() if family in CACHING for at in range(len(options))]
# Generated tokens, and a prompt that windows hold wholly, then one that they do not.
NEW, SHORT, LONG = 10, 5, 17
# Its recurrent layers read padding, of which eager attention and blocks make different things.
UNPADDED = ("recurrent_gemma",)
# Its ALiBi cannot be made of the masks that come with a static cache.
NOT_STATIC = (("falcon", 2),)


def prompts(length, family):
    """Two rows, one of them padded on the left, and the mask."""
    ids = torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, : 0 if family in UNPADDED else length // 3] = 0
    return ids, mask


def real_in(mask, entry):
    """Which of the tokens that a decoder reads are real: beside an encoder, which then has the prompts, all of them."""
    return torch.ones_like(mask) if entry.encoder_decoder else mask


@torch.no_grad()
def generated(model, ids, mask, **options):
    """Tokens, and the logits of each new one (B, NEW, V)."""
    made = model.generate(
        ids,
        attention_mask=mask,
        **{"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **options},
        output_logits=True,
        return_dict_in_generate=True,
    )
    return made.sequences, torch.stack(made.logits, dim=1)


@pytest.mark.parametrize(("family", "variant"), CASES, ids=str)
def test_family(family, variant, tmp_path):
    entry = FAMILIES[family]
    options = {} if variant is None else VARIANTS[family][variant]
    base = save_tiny(family, tmp_path / "base", **options)
    geometry = geometry_of_folder(tmp_path / "base")
    windows = windows_for(geometry)
    folder = convert_by_plan(tmp_path / "base", told(windows), tmp_path / "out")
    groups = {geometry.layers[layer].groups for layer in windows}
    assert len(groups) == 1
    for kernel in ["eager", "sdpa"] if base._supports_sdpa else ["eager"]:
        base = type(base).from_pretrained(tmp_path / "base", attn_implementation=kernel, dtype=torch.float32).eval()
        model = load_converted(folder, attn_implementation=kernel, dtype=torch.float32)
        attentions = attentions_of(base, entry)

        # A long text at once, without a cache.
        ids, mask = prompts(LONG + NEW, family)
        inputs = {"attention_mask": mask, "use_cache": False}
        inputs |= {"decoder_input_ids": ids.flip(1)} if entry.encoder_decoder else {}
        with torch.no_grad(), forced_rows(attentions, windows, *groups, real_in(mask, entry)):
            expected = base(ids, **inputs).logits
        with torch.no_grad():
            found, plain = model(ids, **inputs).logits, base(ids, **inputs).logits
        real = real_in(mask, entry).bool()
        torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)
        assert (plain - expected)[real].abs().max() > 1e-3  # windows matter

        # Step by step: windows that begin to hold less, and such as do so from the first step on.
        for length in (SHORT, LONG):
            ids, mask = prompts(length, family)
            with forced_rows(attentions, windows, *groups, real_in(mask, entry)):
                tokens, expected = generated(base, ids, mask, use_cache=False)
            ways = [{}] + [{"cache_implementation": "static"}] * ((family, variant) not in NOT_STATIC)
            ways += [] if entry.mixed or entry.encoder_decoder else [{"prefill_chunk_size": 4}]
            for way in ways if kernel == "sdpa" else ways[:1]:
                found = generated(model, ids, mask, **way)
                assert torch.equal(found[0], tokens), (kernel, length, way)
                torch.testing.assert_close(found[1], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in CACHING])
def test_a_family_that_caches_nothing_is_refused(family, tmp_path):
    save_tiny(family, tmp_path / "base")
    with pytest.raises(PlanError, match=r"^Layer 1 KV group 0 cannot have a window: it caches nothing\.$"):
        convert_by_plan(tmp_path / "base", told({1: {0: (2, 4)}}), tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "layer", "why"),
    [
        ("qwen3_next", 0, "Layer 0 has no softmax attention, so nothing can be done to it."),
        ("bart", 1, "Layer encoder.1 KV group 0 cannot have a window: it caches nothing."),
        ("t5", 10, "Layer decoder.cross.0 KV group 0 cannot have a window: it attends to what an encoder has read"),
    ],
)
def test_layers_that_cannot_have_windows(family, layer, why, tmp_path):
    save_tiny(family, tmp_path / "base")
    with pytest.raises(PlanError) as refused:
        convert_by_plan(tmp_path / "base", told({layer: {0: (2, 4)}}), tmp_path / "out")
    assert str(refused.value).startswith(why)
