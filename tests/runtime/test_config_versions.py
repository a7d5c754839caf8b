"""config.json of version 1, as the first releases wrote it, is read as version 2."""

import pytest

from sa_convert.errors import CheckpointError, UnsupportedModelError
from sa_convert.families.table import FAMILIES
from sa_convert.plan.converted import upgraded


def config(model_type: str, shared: dict, **others) -> dict:
    return {"model_type": f"shared_attention_{model_type}", **others, "shared_attention": shared}


def test_sources_are_listed_by_kv_group_and_treatment():
    row = [[1, 0], [1, 1], None, None, None, [0, 2], None, None]
    before = config("llama", {"layers": {"2": row}, "form": "queries"}, num_attention_heads=8, num_key_value_heads=4)
    after = upgraded(before, FAMILIES["llama"])
    assert after == before | {
        "shared_attention": {
            "version": 2,
            "modules": {},
            "layers": {"2": {"0": {"share": [[1, 0], [1, 1]]}, "2": {"share": [None, [0, 2]]}}},
            "form": "queries",
        }
    }
    assert before["shared_attention"]["layers"] == {"2": row}
    assert upgraded(after, FAMILIES["llama"]) == after


def test_a_layer_that_shares_nothing_is_left_out():
    after = upgraded(config("llama", {"layers": {"2": [None] * 4}}, num_key_value_heads=2), FAMILIES["llama"])
    assert after["shared_attention"]["layers"] == {}


def test_what_differs_from_llama_is_told():
    after = upgraded(config("bert", {"layers": {}}), FAMILIES["bert"])
    assert after["shared_attention"]["modules"] == {
        "layers": "bert.encoder.layer",
        "attention": "attention.self",
        "query": "query",
        "key": "key",
        "value": "value",
        "output": "attention.output.dense",
        "output_outside": True,
        "bidirectional": True,
        "rotary": "none",
        "exchange": "thread",
        "dropout": "dropout",
    }


def test_stacks_keep_their_labels():
    after = upgraded(config("bart", {"layers": {"decoder.cross.1": [[0, 0], None]}}), FAMILIES["bart"])
    assert after["shared_attention"]["layers"] == {"decoder.cross.1": {"0": {"share": [[0, 0]]}}}
    assert after["shared_attention"]["modules"]["stacks"] == [
        {
            "name": "encoder",
            "layers": "model.encoder.layers",
            "attention": "self_attn",
            "heads": "encoder_attention_heads",
        },
        {
            "name": "decoder",
            "layers": "model.decoder.layers",
            "attention": "self_attn",
            "heads": "decoder_attention_heads",
        },
        {
            "name": "decoder.cross",
            "layers": "model.decoder.layers",
            "attention": "encoder_attn",
            "heads": "decoder_attention_heads",
            "cross": True,
        },
    ]


@pytest.mark.parametrize(
    ("model_type", "keys", "groups"),
    [
        ("llama", {}, 4),
        ("llama", {"num_key_value_heads": 2}, 2),
        ("gemma3", {"text_config": {"num_key_value_heads": 2}}, 2),
        ("gpt_bigcode", {}, 1),
        ("gpt_bigcode", {"multi_query": False}, 4),
        ("falcon", {"num_kv_heads": 4}, 1),
        ("falcon", {"num_kv_heads": 2, "multi_query": False}, 4),
        ("falcon", {"num_kv_heads": 2, "new_decoder_architecture": True}, 2),
    ],
)
def test_kv_groups_are_counted_as_the_family_does(model_type, keys, groups):
    shared = {"layers": {"1": [[0, head] for head in range(4)]}}
    after = upgraded(config(model_type, shared, **keys), FAMILIES[model_type])
    assert list(after["shared_attention"]["layers"]["1"]) == [str(group) for group in range(groups)]


@pytest.mark.parametrize(
    "shared",
    [None, [], {}, {"layers": [1]}, {"layers": {"2": 3}}, {"layers": {"2": [[1, 0]] * 3}}, {"layers": {"2": []}}],
)
def test_what_is_no_map_is_refused(shared):
    with pytest.raises(CheckpointError, match="does not list sources"):
        upgraded(config("llama", shared, num_key_value_heads=2), FAMILIES["llama"])


def test_a_later_version_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"version 3.*pip install -U sa-convert"):
        upgraded(config("llama", {"version": 3, "layers": {}}), FAMILIES["llama"])
