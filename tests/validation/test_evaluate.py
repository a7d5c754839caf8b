"""`sa-convert evaluate`: its numbers against models run by hand, and what it refuses to run or compare."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sa_convert.domain.model import RunOptions
from sa_convert.errors import CheckpointError, SaConvertError
from sa_convert.jobs.evaluating import EvaluateOptions, evaluate
from sa_convert.measure.quality.copying import Probes, copying_loss
from sa_convert.measure.quality.decode import rounding_without_cache
from sa_convert.measure.quality.gate import validate
from sa_convert.models.subject import open_subject
from sa_convert.models.tokens import token_sequences
from sa_convert.plan.audited import foreign_code
from sa_convert.texts.text import load_text
from support.cli_cases import refused
from support.processes import run_cli
from support.tiny_models import load_converted
from support.validation_models import VOCABULARY, save_base, save_converted, tokenizer

SMALL = ["--sequences", 2, "--length", 64, "--device", "cpu"]
OPTIONS = EvaluateOptions(sequences=2, length=64, device="cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def converted(base) -> Path:
    return save_converted(base, base.parent / "converted")


@pytest.fixture
def copied(converted, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(converted, tmp_path / "copied"))


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def log_probabilities(model, tokens: torch.Tensor) -> np.ndarray:
    """(sequences, predicted tokens, vocabulary)"""
    with torch.no_grad():
        logits = model.eval()(tokens, use_cache=False).logits[:, :-1].double().numpy()
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_against_its_base_as_a_process(base, converted, tmp_path):
    environment = {"TMPDIR": str(tmp_path)}
    result = run_cli("evaluate", converted, "--against", base, *SMALL, "--seed", 5, "--json", env=environment)
    assert result.returncode == 0, result.stderr
    assert "%|" in result.stderr  # progress
    assert not list(tmp_path.iterdir())
    found = json.loads(result.stdout)
    text = load_text("builtin").split("validation", ("prose", "code"))
    tokens = token_sequences(tokenizer(), text, 2, 64)
    assert found["text"] == {"name": text.name, "tokens": 126, "sequences": 2, "length": 64}
    assert found["probes"] == {"number": 8, "length": 256, "seed": 5}
    models = {"model": load_converted(converted), "against": AutoModelForCausalLM.from_pretrained(base)}
    rows = {key: log_probabilities(model, tokens) for key, model in models.items()}
    targets = tokens[:, 1:, None].numpy()
    for key, name in (("model", "converted"), ("against", "base")):
        assert (found[key]["id"], found[key]["dtype"]) == (name, "float32")
        loss = -np.take_along_axis(rows[key], targets, axis=-1).mean()
        assert found[key]["loss"] == pytest.approx(loss, rel=1e-5)
        assert found[key]["perplexity"] == pytest.approx(np.exp(loss), rel=1e-5)
        assert found[key]["decode_check"]["passed"] is True
        copying = found[key]["copying"]
        assert (copying["period"], copying["tokens"]) == (128, 8 * 128)
        probes = Probes.of(tokenizer(), VOCABULARY, 256, 5).tokens(128)
        assert copying["loss"] == pytest.approx(copying_loss(models[key], probes, 128).loss, rel=1e-5)
        assert [row["distance"] for row in copying["by_distance"]] == [32, 64, 128]
        assert copying["by_distance"][-1]["loss"] == copying["by_occurrence"][0]
    p, q = rows["against"], rows["model"]
    assert found["agreement"]["kl"] == pytest.approx((np.exp(p) * (p - q)).sum(axis=-1).mean(), rel=1e-4)
    assert found["agreement"]["top1_agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean(), rel=1e-5)
    assert found["agreement"]["tokens"] == 126


def test_a_model_agrees_with_itself(base, converted):
    for folder in (base, converted):
        found = evaluate(str(folder), str(folder), load_text("builtin"), OPTIONS)
        assert found.agreement.kl == 0
        assert found.agreement.top1 == 1
        assert found.model == found.against


def test_a_conversion_that_shares_equal_heads_agrees_with_its_base(tmp_path):
    """Planted: layers 2 and 3 have the queries and keys of layer 1, whose input they get unchanged."""
    save_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        layers = model.model.layers
        for layer in layers[1:3]:  # nothing is added to the hidden states between the inputs of 1, 2 and 3
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for layer in layers[2:4]:
            layer.input_layernorm.load_state_dict(layers[1].input_layernorm.state_dict())
            for name in ("q_proj", "k_proj"):
                getattr(layer.self_attn, name).load_state_dict(getattr(layers[1].self_attn, name).state_dict())
    model.save_pretrained(tmp_path / "base")
    same = save_converted(tmp_path / "base", tmp_path / "same")
    found = evaluate(str(same), str(tmp_path / "base"), load_text("builtin"), OPTIONS)
    assert found.agreement.kl == pytest.approx(0, abs=1e-9)
    assert found.agreement.top1 == 1
    other = save_converted(tmp_path / "base", tmp_path / "other", source=0)
    found = evaluate(str(other), str(tmp_path / "base"), load_text("builtin"), OPTIONS)
    assert found.agreement.kl > 1e-4


def test_alone_in_a_terminal(base):
    result = run_cli("evaluate", base, *SMALL)
    assert result.returncode == 0, result.stderr
    labels = [line.split("  ")[0] for line in result.stdout.splitlines()]
    assert {"Perplexity", "Cached decoding", "Copying loss, nats"} <= set(labels)
    assert "at distance 64" in result.stdout
    assert "126 tokens in 2 sequences of 64" in result.stdout
    assert "KL" not in result.stdout


def test_pickled_weights(base, tmp_path):
    from safetensors.torch import load_file

    pickled = Path(shutil.copytree(base, tmp_path / "base"))
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    found = evaluate(str(pickled), str(base), load_text("builtin"), OPTIONS)
    assert found.model == found.against


def test_bfloat16_has_a_tolerance_of_its_own(tmp_path, base):
    half = save_base(tmp_path / "half", dtype=torch.bfloat16)
    check = evaluate(
        str(half), None, load_text("builtin"), EvaluateOptions(sequences=2, length=64, dtype="bfloat16")
    ).model.decode_check
    assert check.passed
    assert check.tolerance > 1e-3
    assert rounding_without_cache(AutoModelForCausalLM.from_pretrained(base), torch.arange(2, 40)) == 0


def test_convert_reports_the_same_probe(base, converted):
    copying = validate(base, converted, load_text("builtin"), None, sequences=2, length=64).copying
    found = evaluate(str(converted), str(base), load_text("builtin"), OPTIONS)
    assert (copying.period, copying.tokens) == (128, 8 * 128)
    assert copying.before == found.against.headline.loss
    assert copying.after == found.model.headline.loss


def test_changed_code_runs_only_where_it_is_trusted(copied, tmp_path):
    code = copied / "shared_attention_share.py"
    ran = tmp_path / "ran"
    code.write_text(code.read_text() + f"\nopen({str(ran)!r}, 'w')\n")
    result = run_cli("evaluate", copied, *SMALL)
    refused(
        result,
        1,
        r"its code shared_attention_share\.py is not what this version .*--trust-remote-code",
    )
    assert not ran.exists()
    trusting = run_cli("evaluate", copied, *SMALL, "--trust-remote-code")
    assert trusting.returncode == 0, trusting.stderr
    assert ran.exists()


def test_every_way_to_foreign_code_is_found(converted, copied):
    def fault(folder):
        with pytest.raises(CheckpointError) as caught:
            open_subject(str(folder), folder.parent / "workspace", RunOptions(), foreign_code)
        return str(caught.value)

    opened = open_subject(str(converted), converted.parent / "workspace", RunOptions(), foreign_code)
    assert (opened.name, opened.converted) == ("converted", True)
    custom = copied / "custom_generate" / "generate.py"
    custom.parent.mkdir()
    custom.write_text("")
    assert "custom_generate/generate.py" in fault(copied)
    shutil.rmtree(custom.parent)
    hidden = copied / ".hidden"
    hidden.mkdir()
    custom.parent.symlink_to(hidden)
    assert "a link to a folder" in fault(copied)
    custom.parent.unlink()
    (copied / "extra.py").write_text("")
    assert "extra.py" in fault(copied)
    (copied / "extra.py").unlink()
    original = json.loads((copied / "config.json").read_text())["auto_map"]
    for reference in ("org/name--modeling_shared_attention.X", "../conversion.X", "__init__.X", "elsewhere.X"):
        edit_json(copied / "config.json", auto_map={**original, "AutoModelForCausalLM": reference})
        assert reference in fault(copied)
    edit_json(copied / "config.json", auto_map=original)
    edit_json(copied / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "org/name--code.X"]})
    assert "tokenizer_config.json names code of its own" in fault(copied)


def test_code_of_an_ordinary_model_is_not_run(base, tmp_path):
    folder = Path(shutil.copytree(base, tmp_path / "own"))
    (folder / "own.py").write_text("raise RuntimeError('ran')")
    edit_json(
        folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    )
    result = run_cli("evaluate", folder, *SMALL)
    refused(result, 1, "own: transformers does not know this type .* --trust-remote-code")
    assert "'ran'" not in result.stderr


def test_models_that_cannot_be_compared(base, tmp_path):
    other = save_base(tmp_path / "other", vocab_size=VOCABULARY + 4)
    with pytest.raises(CheckpointError, match="different vocabularies, of 304 and 300 tokens"):
        evaluate(str(other), str(base), load_text("builtin"), OPTIONS)
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["merges"] = words["model"]["merges"][:5]
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(CheckpointError, match="tokenizers of other and base make different tokens"):
        evaluate(str(other), str(base), load_text("builtin"), OPTIONS)


def test_wrong_input(base, copied, tmp_path):
    refused(run_cli("evaluate", tmp_path / "none"), 1, "none: there is no such folder")
    short = tmp_path / "short.txt"
    short.write_text("Few words. " * 5)
    refused(run_cli("evaluate", base, "--text", short, "--device", "cpu"), 1, r"short\.txt.*too few.*longer text")
    with pytest.raises(SaConvertError, match="--length 257 is more than the 256 positions"):
        evaluate(str(base), None, load_text("builtin"), EvaluateOptions(length=257))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
    refused(run_cli("evaluate", copied, *SMALL), 1, "copied: no tokenizer that can be loaded")


def test_weights_that_are_not_finite(base, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(SaConvertError, match="broken: the perplexity is not finite"):
        evaluate(str(broken), None, load_text("builtin"), OPTIONS)
