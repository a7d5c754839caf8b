"""Plans that do several things: windows and sharing beside layers that have no attention, or a linear map for it."""

import pytest
import torch
import yaml

from sa_convert.jobs.converting import ConvertOptions, convert
from sa_convert.plan.recipe_file import parse_recipe
from support.forced_rows import forced_rows
from support.tiny_models import FAMILIES, attentions_of, load_converted, save_tiny, save_tokenizer
from support.whole_layers import overruled

WINDOWS = {1: {0: (2, 5), 3: (0, 4)}, 4: {2: (1, 6)}}


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3"])
def test_windows_beside_whole_layers(model_type, tmp_path):
    base = save_tiny(model_type, tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    plan = {
        layer: {group: {"window": {"sinks": sinks, "tokens": tokens}} for group, (sinks, tokens) in groups.items()}
        for layer, groups in WINDOWS.items()
    }
    plan |= {0: "drop", 3: "linear", 5: "drop"}
    text = yaml.safe_dump({"plan": plan, "calibration": {"sequences": 6, "length": 32}})
    recipe, options = parse_recipe(text, "mixed.yaml"), ConvertOptions(device="cpu", validate=False)
    convert(str(tmp_path / "base"), recipe, tmp_path / "out", options, "mixed.yaml")
    assert (tmp_path / "out" / "figures" / "plan.png").is_file()
    ids = torch.randint(3, 120, (2, 20), generator=torch.Generator().manual_seed(0))
    for kernel in ("eager", "sdpa"):
        if kernel == "sdpa" and not base._supports_sdpa:
            continue
        model = load_converted(tmp_path / "out", attn_implementation=kernel)
        maps = {0: None, 3: model.model.layers[3].self_attn.linear.forward, 5: None}
        attentions = attentions_of(base, FAMILIES[model_type])
        with torch.no_grad(), overruled(base, model_type, maps), forced_rows(attentions, WINDOWS, 4):
            wanted = base(ids, use_cache=False).logits
            tokens = base.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, wanted, atol=2e-5, rtol=1e-4)
        for way in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, **way), tokens), way


def test_sharing_beside_whole_layers(tmp_path):
    """The share between layers 1 and 4 with layer 0, 2 and 3 gone: the same as the base with both changes."""
    from support.forced_attention import forced_attention

    base = save_tiny("llama", tmp_path / "base")
    rows = {4: [[1, 3], [1, 2], *[None] * 6]}
    plan = {0: "drop", 2: "drop", 3: "drop", 4: {0: {"share": rows[4][:2]}}}
    recipe, options = parse_recipe(yaml.safe_dump({"plan": plan}), "mixed.yaml"), ConvertOptions(validate=False)
    convert(str(tmp_path / "base"), recipe, tmp_path / "out", options, "mixed.yaml")
    model = load_converted(tmp_path / "out")
    ids = torch.randint(3, 120, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), overruled(base, "llama", {0: None, 2: None, 3: None}), forced_attention(base, rows):
        torch.testing.assert_close(model(ids).logits, base(ids, use_cache=False).logits, atol=2e-5, rtol=1e-4)
        tokens = base.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), tokens)
