"""Models that are refused by their type, their config or their tensors are told the reason that is true of them."""

import json

import pytest

from sa_convert.errors import UnsupportedModelError
from sa_convert.families.refusals import NO_ENTRY, refused_types
from sa_convert.families.table import FAMILIES, HOME
from sa_convert.read.family_of import family_of


def refusal(config, tensors=()):
    with pytest.raises(UnsupportedModelError) as caught:
        family_of(config, tensors)
    return str(caught.value)


@pytest.mark.parametrize(
    ("types", "words"),
    [
        ("gpt_neo mpt codegen ctrl xlm xlnet openai-gpt cpmant", "code of its own"),
        ("mamba falcon_mamba rwkv xlstm", "no attention probabilities to share"),
        ("nemotron_h zamba zamba2", "hybrid layers"),
        ("afmoe beam laguna lfm3 hrm_text", "gates the attention's output"),
        ("granite_swa granitemoe_swa", "sinks"),
        ("diffllama", "differential attention"),
        ("doge", "made from the values"),
        ("gemma3n_text", "shares keys and values between layers already"),
        ("gemma4_text gemma4_unified_text", "share keys and values already"),
        ("minimax_m3_vl_text qwen4_exp_text", "indexer"),
        ("big_bird bigbird_pegasus", "block-sparse"),
        ("longformer led", "overlapping chunks"),
        ("reformer", "LSH"),
        ("jetmoe", "mixture of experts"),
        ("mimo_v2_flash", "number of KV groups"),
        ("dbrx", "clip_qkv"),
        ("deepseek_v4", "latent attention"),
    ],
)
def test_the_type_tells(types, words):
    for model_type in types.split():
        told = refusal({"model_type": model_type}, ["model.layers.0.self_attn.q_proj.weight"])
        assert words in told
        assert NO_ENTRY not in told


def test_every_family_has_one_entry():
    """A dict would keep the last of two without a word."""

    def once(pairs):
        assert len(dict(pairs)) == len(pairs), [key for key, _ in pairs]
        return dict(pairs)

    for file in [*HOME.glob("*.json"), *HOME.parent.glob("*.json")]:
        json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=once)
    assert len(list(HOME.glob("*.json"))) == len(FAMILIES)


def test_no_type_is_both_refused_and_supported():
    assert not set(refused_types()) & set(FAMILIES)


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        (["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"], {}, "latent attention (MLA)"),
        (["l.0.mixer.A_log", "l.1.mixer.q_proj.weight"], {}, "hybrid layers (attention and state-space)"),
        (["l.0.mixer.A_log", "l.0.mixer.in_proj.weight"], {}, "recurrent (state-space) layers only"),
        (["h.0.attn.qkv_proj.weight"], {}, "a layout that is not known ('h.0.attn.qkv_proj.weight')"),
        (["model.layers.0.hc_attn_base", "model.layers.0.linear_attn.qkv.weight"], {}, NO_ENTRY),
        (["vision_tower.0.attn.qkv.weight"], {"vision_config": {}}, "multimodal"),
        (["vision_tower.0.attn.qkv.weight"], {}, NO_ENTRY),
        (["encoder.0.attn.q.weight"], {"is_encoder_decoder": True}, "encoder-decoder of a make"),
        ([], {"auto_map": {}}, "not part of transformers"),
        ([], {}, NO_ENTRY),
    ],
)
def test_config_and_tensors_tell_of_unknown_types(tensors, config, words):
    assert words in refusal({"model_type": "quite_new", **config}, tensors)


def test_a_family_can_refuse_an_option():
    told = refusal({"model_type": "mvp", "use_prompt": True})
    assert "'use_prompt' is True" in told
    assert "prompts" in told
    assert family_of({"model_type": "mvp", "use_prompt": False}) is FAMILIES["mvp"]
    assert family_of({"model_type": "mvp"}) is FAMILIES["mvp"]
