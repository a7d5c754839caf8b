"""The metadata of the model card: read back by huggingface_hub's classes, and checked as the Hub checks them."""

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from sa_convert.domain.report import BaseModel
from sa_convert.present.files.card import for_repository, write_card
from support.loopback_hub.card import check_card
from support.measured_report import MEASURED, UNMEASURED

LOCAL = replace(MEASURED, base_model=BaseModel("smol.gguf"))


def card_of(report, folder, base_card=None):
    """The card of a report, which the Hub would accept without a remark."""
    base = None
    if base_card is not None:
        base = folder / "base.md"
        base.write_text(base_card, encoding="utf-8")
    card = ModelCard.load(write_card(report, "sharing: {}", folder, base))
    assert check_card(str(card)) == ([], [])
    return card


def test_relation_to_the_base(tmp_path):
    data = card_of(MEASURED, tmp_path).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "finetune")
    assert not {"base_model", "base_model_relation"} & set(card_of(LOCAL, tmp_path).data.to_dict())


def test_perplexity_before_and_after_as_results(tmp_path):
    card = card_of(MEASURED, tmp_path)
    assert card.data.model_name == "base with shared attention"
    found = [(result.metric_name, result.metric_type, result.metric_value) for result in card.data.eval_results]
    assert found == [("Perplexity", "perplexity", 15.0), ("Perplexity of the base model", "perplexity", 14.2948)]
    [result] = card.data.to_dict()["model-index"][0]["results"]
    assert result["task"] == {"type": "text-generation"}
    assert result["metrics"][0]["args"] == {"tokens": 8176, "dtype": "float32"}
    assert card_of(UNMEASURED, tmp_path).data.eval_results is None


@pytest.mark.parametrize(
    ("text", "dataset"),
    [
        ("hub:org/set:en:test, validation part", ("org/set", "en", "test")),
        ("hub:org/set:en, second half", ("org/set", "en", "train")),
        ("hub:set, second half", ("set", None, "train")),
        ("file notes.txt, second half", ("text", None, None)),
    ],
)
def test_data_set_of_the_results(tmp_path, text, dataset):
    report = replace(MEASURED, perplexity=replace(MEASURED.perplexity, text=text))
    for result in card_of(report, tmp_path).data.eval_results:
        assert (result.dataset_type, result.dataset_config, result.dataset_split) == dataset
        assert result.dataset_name == text


def test_results_of_masked_models_are_named_so(tmp_path):
    perplexity = replace(MEASURED.perplexity, task="masked-token")
    report = replace(MEASURED, perplexity=perplexity, auto_class="AutoModelForMaskedLM")
    card = card_of(report, tmp_path)
    assert card.data.pipeline_tag == card.data.eval_results[0].task_type == "fill-mask"
    assert card.data.eval_results[1].metric_name == "Perplexity (masked-token) of the base model"


@pytest.mark.parametrize(
    ("base", "inherited"),
    [
        ("license: apache-2.0\nlanguage: en", {"license": "apache-2.0", "language": "en"}),
        # YAML takes this for false; the Hub, and everyone else, for Norwegian.
        ("license: mit\nlanguage: [en, no]", {"license": "mit", "language": ["en", "no"]}),
        ("license: [mit, apache-2.0]", {"license": ["mit", "apache-2.0"]}),
        ("license:\nlanguage: null", {}),
        ("license: {name: mit}\nlanguage: []", {}),
        (
            "license: other\nlicense_name: special\nlicense_link: LICENSE.md",
            {
                "license": "other",
                "license_name": "special",
                "license_link": "https://huggingface.co/org/base/blob/main/LICENSE.md",
            },
        ),
    ],
)
def test_inherited(tmp_path, base, inherited):
    card = card_of(MEASURED, tmp_path, f"---\n{base}\n---\n# Base\n")
    keys = ("license", "license_name", "license_link", "language")
    assert {key: value for key, value in card.data.to_dict().items() if key in keys} == inherited
    assert ("licence of the base model applies" in card.text) == ("license" not in inherited)


def test_link_to_a_licence_beside_the_card_stays(tmp_path):
    (tmp_path / "LICENSE").write_text("the licence")
    base = "---\nlicense: other\nlicense_link: LICENSE\n---\n"
    assert card_of(MEASURED, tmp_path, base).data.license_link == "LICENSE"
    (tmp_path / "LICENSE").unlink()
    assert card_of(LOCAL, tmp_path, base).data.license_link is None


def test_card_of_a_repository_loads_it(tmp_path):
    text = write_card(MEASURED, "sharing: {}", tmp_path).read_text()
    named = for_repository(text, "org/new")
    assert named.count('from_pretrained("org/new", trust_remote_code=True)') == 2
    branch = for_repository(text, "org/new", "light")
    assert branch.count('from_pretrained("org/new", revision="light", trust_remote_code=True)') == 2
    assert "PATH_OR_REPO_ID" not in named + branch


def test_first_lines_say_what_is_saved_and_what_it_costs(tmp_path):
    text = write_card(MEASURED, "sharing: {}", tmp_path).read_text()
    head = text.split("## ")[0]
    assert (
        "**keys in the cache -13.3%, parameters -3.4%, perplexity +4.93%, copying from the context +0.20 nats per "
        "token**" in head
    )
    unmeasured = write_card(UNMEASURED, "sharing: {}", tmp_path).read_text()
    assert "**keys in the cache -13.3%, parameters -3.4%; quality not measured**" in unmeasured


def test_no_change_has_no_minus(tmp_path):
    report = replace(MEASURED, copying=replace(MEASURED.copying, before=1.5, after=1.4999))
    text = write_card(report, "sharing: {}", tmp_path).read_text()
    assert text.count("+0.00") == 2
    assert "-0.00" not in text


def test_code_of_the_base_is_named(tmp_path):
    report = replace(MEASURED, base_model=replace(MEASURED.base_model, code=("modeling_own.py",)))
    assert "code of its own (`modeling_own.py`)" in write_card(report, "sharing: {}", tmp_path).read_text()
    assert "code of its own (" not in write_card(MEASURED, "sharing: {}", tmp_path).read_text()
