"""Attention types, windows and rotation read from config.json agree with what transformers makes of it."""

import pytest
from tiny_models import tiny_config

from sa_convert.export.shared_attention_families import FAMILIES
from sa_convert.read.geometry import attention_kinds

DEPTH = 12
VARIANTS = [
    {},
    {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 5},
    {"sliding_window": None},
    {"sliding_window_pattern": 3},
    {"no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 32},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_agree_with_transformers(model_type, variant):
    from transformers import AutoConfig

    known = AutoConfig.for_model(model_type)
    if not all(hasattr(known, key) or key == "sliding_window_pattern" for key in variant):
        variant = {}
    if model_type == "exaone4" and "sliding_window" in variant:
        variant = {**variant, "layer_types": ["full_attention"] * DEPTH}  # transformers divides by its pattern of 0
    raw = {"model_type": model_type, "num_hidden_layers": DEPTH, **variant}
    config = AutoConfig.for_model(**raw)
    kinds = attention_kinds(raw, FAMILIES[model_type], DEPTH)

    window = getattr(config, "sliding_window", None) or None
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["sliding_attention" if window else "full_attention"] * DEPTH
    assert [kind for kind, _, _ in kinds] == list(types)
    assert {size for kind, size, _ in kinds if kind == "sliding_attention"} <= {window}
    assert {size for kind, size, _ in kinds if kind == "full_attention"} <= {None}
    if FAMILIES[model_type].rotary == "no_rope_layers":
        assert [rotary for _, _, rotary in kinds] == [bool(flag) for flag in config.no_rope_layers]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_listed_types_win(model_type):
    types = ["full_attention", "sliding_attention"] * 2
    raw = {"layer_types": types, "sliding_window": 64, "use_sliding_window": True}
    kinds = attention_kinds(raw, FAMILIES[model_type], 4)
    assert [kind for kind, _, _ in kinds] == types
    assert [size for _, size, _ in kinds] == [None, 64, None, 64]


def test_rotary_of_sliding_layers_only():
    """Cohere 2 and EXAONE 4 rotate queries and keys in sliding layers only, as their modeling code says."""
    for model_type in ("cohere2", "exaone4"):
        config = tiny_config(model_type)
        kinds = attention_kinds(config.to_dict(), FAMILIES[model_type], config.num_hidden_layers)
        assert {(kind, rotary) for kind, _, rotary in kinds} == {("sliding_attention", True), ("full_attention", False)}
