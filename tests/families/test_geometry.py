"""Attention types, windows and rotation read from config.json agree with what transformers makes of it."""

import pytest

from sa_convert.families.table import FAMILIES
from sa_convert.read.geometry_of import attention_kinds
from support.tiny_models import tiny_config

DEPTH = 12
VARIANTS = [
    {},
    {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 5},
    {"sliding_window": None},
    {"sliding_window_pattern": 3},
    {"no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 32},
]
# Their configuration classes refuse a model without a window.
NEEDS_WINDOW = ("cwm", "exaone_moe", "kolibri1")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_agree_with_transformers(model_type, variant):
    from transformers import AutoConfig

    entry = FAMILIES[model_type]
    known = AutoConfig.for_model(model_type)
    known = getattr(known, entry.text) if entry.text else known
    other = entry.windows.size_key != "sliding_window" and "sliding_window" in variant
    other = other or (model_type in NEEDS_WINDOW and variant.get("sliding_window", 0) is None)
    if other or not all(hasattr(known, key) or key == "sliding_window_pattern" for key in variant):
        variant = {}
    if model_type == "exaone4" and "sliding_window" in variant:
        variant = {**variant, "layer_types": ["full_attention"] * DEPTH}  # transformers divides by its pattern of 0
    raw = {"num_hidden_layers": DEPTH, **variant}
    config = AutoConfig.for_model(model_type, **({entry.text: raw} if entry.text else raw))
    config = getattr(config, entry.text) if entry.text else config
    kinds = attention_kinds(raw, entry, DEPTH)

    window = getattr(config, entry.windows.size_key, None) or None
    types = getattr(config, "layer_types", None)
    if types is None or "attention" in types:  # Jamba's word for any kind of attention
        types = ["sliding_attention" if window else "full_attention"] * DEPTH
    # Of layers without softmax attention, the tensors tell.
    seen = [at for at, kind in enumerate(types) if kind != "linear_attention"]
    assert [kinds[at][0] for at in seen] == [types[at] for at in seen]
    assert {kinds[at][1] for at in seen if kinds[at][0] == "sliding_attention"} <= {window}
    assert {kinds[at][1] for at in seen if kinds[at][0] == "full_attention"} <= {None}
    if FAMILIES[model_type].modules.rotary == "no_rope_layers":
        assert [rotary for _, _, rotary in kinds] == [bool(flag) for flag in config.no_rope_layers]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_listed_types_win(model_type):
    types = ["full_attention", "sliding_attention"] * 2
    raw = {"layer_types": types, FAMILIES[model_type].windows.size_key: 64, "use_sliding_window": True}
    kinds = attention_kinds(raw, FAMILIES[model_type], 4)
    assert [kind for kind, _, _ in kinds] == types
    assert [size for _, size, _ in kinds] == [None, 64, None, 64]


def test_rotary_of_sliding_layers_only():
    """Cohere 2 and EXAONE 4 rotate queries and keys in sliding layers only, as their modeling code says."""
    for model_type in ("cohere2", "exaone4"):
        config = tiny_config(model_type)
        kinds = attention_kinds(config.to_dict(), FAMILIES[model_type], config.num_hidden_layers)
        assert {(kind, rotary) for kind, _, rotary in kinds} == {("sliding_attention", True), ("full_attention", False)}
