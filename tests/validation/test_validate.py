"""Validation of a converted folder: what it measures, and what it refuses."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from sa_convert.domain.model import RunOptions
from sa_convert.domain.report import GateResult
from sa_convert.errors import CheckpointError, DataError, GateRefused, SaConvertError
from sa_convert.measure.quality.cache_bytes import cache_bytes_per_token
from sa_convert.measure.quality.decode import decode_check, rounding_difference
from sa_convert.measure.quality.gate import COMPARED, KINDS, refuse_if_failed, validate
from sa_convert.measure.quality.perplexity import perplexity
from sa_convert.models.arguments import cache_keyword
from sa_convert.models.load import load_base, load_converted
from sa_convert.models.placement import place
from sa_convert.models.tokens import token_sequences
from sa_convert.texts.text import load_text
from support.validation_models import VOCABULARY, save_base, save_converted, tiny_config

SMALL = {"sequences": 3, "length": 96, "run": RunOptions(device="cpu")}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def converted(base) -> Path:
    return save_converted(base, base.parent / ".converted.partial")


@pytest.fixture
def copies(base, converted, tmp_path) -> tuple[Path, Path]:
    """The same two folders, for tests that damage them."""
    return tuple(Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in (base, converted))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(1))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_perplexity_equals_numpy(base, tokens):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits.double().numpy()
    losses = [
        np.log(np.exp(row[t]).sum()) - row[t][int(target)]
        for row, ids in zip(logits, tokens, strict=True)
        for t, target in enumerate(ids[1:])
    ]
    for batch in (1, 2):
        measured = perplexity(model, tokens, batch=batch)
        assert measured.tokens == 3 * 39
        assert measured.loss == pytest.approx(np.mean(losses), rel=1e-6)
        assert measured.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)


def test_validate_measures_the_folder(base, converted):
    validation = validate(base, converted, load_text("builtin"), 0.5, **SMALL)
    measured = validation.perplexity
    assert measured.text == "builtin, validation part (prose and code)"
    assert measured.tokens == 3 * 95
    assert measured.dtype == "float32"
    assert 1 < measured.before < 2 * VOCABULARY
    assert measured.after != measured.before
    assert validation.decode_check.passed
    assert validation.gate == GateResult(0.5, True)
    # 5 layers of 2 groups of 16 elements, key and value, 4 bytes; two layers lose their keys.
    assert validation.cache_bytes_per_token.before == 5 * 2 * 16 * 2 * 4
    assert validation.cache_bytes_per_token.after == (5 * 2 - 2) * 2 * 16 * 4
    refuse_if_failed(validation)


def test_agreement_equals_numpy(base, converted, monkeypatch):
    """On the first COMPARED sequences only; and nothing is claimed where the logits do not fit on disk."""
    found = validate(base, converted, load_text("builtin"), None, **{**SMALL, "sequences": COMPARED + 2}).agreement
    tokenizer = AutoTokenizer.from_pretrained(base)
    held_out = load_text("builtin").split("validation", KINDS)
    tokens = token_sequences(tokenizer, held_out, COMPARED + 2, SMALL["length"], None)[:COMPARED]
    placement = place(base, "cpu")
    chances = []
    for load, folder in ((load_base, base), (load_converted, converted)):
        with load(folder, placement) as loaded, torch.no_grad():
            logits = loaded.model(tokens, use_cache=False).logits[:, :-1].double().numpy()
        chances.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    p, q = chances
    assert found.tokens == tokens.numel() - COMPARED
    assert found.kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-5)
    assert found.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    full = SimpleNamespace(total=10**12, used=10**12, free=0)
    monkeypatch.setattr("sa_convert.output.disk_space.shutil.disk_usage", lambda _: full)
    assert validate(base, converted, load_text("builtin"), None, **SMALL).agreement is None


def test_code_in_the_folder_is_what_runs(copies):
    base, converted = copies
    code = converted / "modeling_shared_attention.py"
    code.write_text(code.read_text() + "\nraise RuntimeError('the code of this folder ran')\n")
    with pytest.raises(CheckpointError, match="the code of this folder ran"):
        validate(base, converted, load_text("builtin"), None, **SMALL)


def test_in_a_process_of_its_own(base, converted, tmp_path):
    """Quiet, leaves nothing behind, and runs the folder's code even where sa_convert's classes are registered."""
    script = f"""
from pathlib import Path
import sa_convert
from sa_convert.texts.text import load_text
from sa_convert.measure.quality.gate import validate
from sa_convert.models.load import load_converted
from sa_convert.models.placement import place
base, converted = Path({str(base)!r}), Path({str(converted)!r})
validate(base, converted, load_text("builtin"), None, sequences=2, length=64)
from transformers import AutoConfig
assert type(AutoConfig.from_pretrained(converted)).__module__.startswith("sa_convert."), "not registered"
with load_converted(converted, place(base, "cpu")) as loaded:
    assert type(loaded.model).__module__.startswith("transformers_modules."), type(loaded.model).__module__
"""
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    temporary.mkdir()
    dropped = ("HF_MODULES_CACHE", "TRANSFORMERS_VERBOSITY")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"HF_HOME": str(home), "TMPDIR": str(temporary), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    lines = [line.strip() for line in re.split(r"[\r\n]", done.stderr) if line.strip()]
    assert [line for line in lines if not line.startswith(("perplexity of the ", "decode check", "copying, "))] == []
    assert not list(temporary.iterdir())
    assert not (home / "modules").exists()


def test_offloaded_to_disk_gives_the_same(base, converted):
    whole = validate(base, converted, load_text("builtin"), 0.5, **SMALL)
    bounds = {"cpu": 200_000}
    placement = place(converted, "cpu", "auto", bounds)
    with load_converted(converted, placement) as loaded:
        assert "disk" in loaded.model.hf_device_map.values()
    offloaded = validate(base, converted, load_text("builtin"), 0.5, max_memory=bounds, **SMALL)
    assert offloaded.perplexity.before == pytest.approx(whole.perplexity.before, rel=1e-6)
    assert offloaded.perplexity.after == pytest.approx(whole.perplexity.after, rel=1e-6)
    assert offloaded.decode_check.passed


def test_weights_beyond_memory_are_offloaded(base, monkeypatch):
    import psutil

    assert place(base, "cpu").max_memory is None
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=100_000))
    assert place(base, "cpu").max_memory == {"cpu": 80_000}


def test_float16_is_computed_in_float32_on_a_cpu_and_its_cache_counts_as_float16(tmp_path):
    half = save_base(tmp_path / "half", dtype=torch.float16)
    shared = save_converted(half, tmp_path / "shared")
    validation = validate(half, shared, load_text("builtin"), None, **SMALL)
    assert validation.perplexity.dtype == "float32"
    assert validation.cache_bytes_per_token.before == 5 * 2 * 16 * 2 * 2
    assert validation.gate is None


def test_bfloat16_passes_with_the_tolerance_of_its_base(tmp_path):
    half = save_base(tmp_path / "half", dtype=torch.bfloat16)
    shared = save_converted(half, tmp_path / "shared")
    validation = validate(
        half, shared, load_text("builtin"), None, **{**SMALL, "run": RunOptions(device="cpu", dtype="bfloat16")}
    )
    assert validation.perplexity.dtype == "bfloat16"
    assert validation.decode_check.passed
    assert validation.decode_check.max_abs_logit_difference > 1e-3


def test_sliding_window_cache(tmp_path):
    base = save_base(tmp_path / "m", "mistral", sliding_window=8)
    with load_base(base, place(base, "cpu")) as loaded:
        assert cache_bytes_per_token(loaded.model, torch.arange(20)) == 5 * 2 * 16 * 2 * 4


class ForgetsPositions(LlamaForCausalLM):
    """Rotates every cached step as if it were the first token: right in one pass, wrong with a cache."""

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        cache = kwargs.get(cache_keyword(super()))
        if cache is not None and cache.get_seq_length() > 0:
            position_ids = torch.zeros_like(input_ids)
        return super().forward(input_ids, position_ids=position_ids, **kwargs)


class PicksOtherTokens(LlamaForCausalLM):
    """The logits are right, but generate() with a cache goes astray."""

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if kwargs.get("use_cache") and inputs["input_ids"].shape[1] == 1:
            inputs["input_ids"] = inputs["input_ids"] * 0 + 5
        return inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_check_catches_a_broken_cache_that_perplexity_misses(tokens, dtype):
    torch.manual_seed(0)
    config = tiny_config(initializer_range=0.5)
    good = LlamaForCausalLM(config).to(dtype).eval()
    broken = ForgetsPositions(config).to(dtype).eval()
    broken.load_state_dict(good.state_dict())
    assert perplexity(broken, tokens) == perplexity(good, tokens)
    rounding = rounding_difference(good, tokens[0])
    assert (rounding > 0) == (dtype == torch.bfloat16)
    assert decode_check(good, tokens[0], rounding).passed
    check = decode_check(broken, tokens[0], rounding)
    assert not check.passed
    assert check.max_abs_logit_difference > check.tolerance


def test_decode_check_compares_generated_tokens(tokens):
    torch.manual_seed(0)
    config = tiny_config(initializer_range=0.5)
    astray = PicksOtherTokens(config).eval()
    check = decode_check(astray, tokens[0])
    assert check.max_abs_logit_difference <= check.tolerance
    assert not check.same_greedy_tokens
    assert not check.passed


def test_decode_check_ignores_sampling_and_beams_of_the_generation_config(base, tokens):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    model.generation_config.update(do_sample=True, temperature=3.0, num_beams=2, repetition_penalty=1.5)
    assert decode_check(model, tokens[0]).passed


def test_gate_says_by_how_much_and_what_to_try(base, converted):
    validation = validate(base, converted, load_text("builtin"), 0.05, **SMALL)
    worse = replace(validation.perplexity, before=10.0, after=11.234)
    failed = replace(validation, perplexity=worse, gate=GateResult(0.05, False))
    with pytest.raises(
        GateRefused, match=r"rises by 12.34% \(limit 5%\), from 10.00 to 11.23: .* less, or .*increase 13%"
    ):
        refuse_if_failed(failed)
    assert GateRefused.exit_code == 3


def test_gate_refuses_a_real_increase(copies):
    base, converted = copies

    def spoil(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"] * -8

    edit_weights(converted, spoil)
    validation = validate(base, converted, load_text("builtin"), 0.05, **SMALL)
    assert validation.perplexity.increase > 0.05
    assert not validation.gate.passed
    with pytest.raises(GateRefused, match="perplexity rises"):
        refuse_if_failed(validation)


def test_failed_decode_check_is_refused_without_a_limit(base, converted):
    validation = validate(base, converted, load_text("builtin"), None, **SMALL)
    wrong = replace(validation.decode_check, max_abs_logit_difference=7.0)
    with pytest.raises(GateRefused, match=r"decodes wrongly: with a cache logits differ by 7 \(tolerance 0.001\)"):
        refuse_if_failed(replace(validation, decode_check=wrong))
    other = replace(validation.decode_check, same_greedy_tokens=False)
    with pytest.raises(GateRefused, match="it generates other tokens"):
        refuse_if_failed(replace(validation, decode_check=other))


def put_nan(tensors) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")


def test_nan_weights(copies):
    base, converted = copies
    edit_weights(converted, put_nan)
    with pytest.raises(GateRefused, match="converted model's perplexity is not finite"):
        validate(base, converted, load_text("builtin"), None, **SMALL)
    edit_weights(base, put_nan)
    with pytest.raises(GateRefused, match="base model's perplexity is not finite"):
        validate(base, converted, load_text("builtin"), None, **SMALL)


def drop_down_proj(tensors) -> None:
    del tensors["model.layers.1.mlp.down_proj.weight"]


def test_missing_superfluous_and_wrong_tensors(copies):
    base, converted = copies
    placement = place(base, "cpu")

    def add(tensors):
        tensors["model.layers.2.self_attn.k_proj.weight"] = torch.zeros(32, 64)

    edit_weights(converted, add)
    with (
        pytest.raises(CheckpointError, match=r"has unexpected keys: model\.layers\.2\.self_attn\.k_proj\.weight"),
        load_converted(converted, placement),
    ):
        pass
    known = frozenset({"model.layers.2.self_attn.k_proj.weight"})
    with load_converted(converted, placement, known) as loaded:
        assert loaded.unexpected == known
    edit_weights(converted, drop_down_proj)
    with (
        pytest.raises(CheckpointError, match=r"converted model has missing keys: .*layers\.1\.mlp\.down_proj"),
        load_converted(converted, placement, known),
    ):
        pass
    edit_weights(base, drop_down_proj)
    with pytest.raises(CheckpointError, match="base has missing keys"), load_base(base, placement):
        pass


def test_no_tokenizer(copies):
    base, converted = copies
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    with pytest.raises(DataError, match=r"add the model's tokenizer files .*--no-validate"):
        validate(base, converted, load_text("builtin"), None, **SMALL)


def test_tokenizer_of_another_model(copies):
    base, converted = copies
    for folder in copies:
        edit_config(folder, vocab_size=50)
        tensors = load_file(folder / "model.safetensors")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:50].clone()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="embeddings of 50 tokens only"):
        validate(base, converted, load_text("builtin"), None, **SMALL)


def test_tokenizer_that_the_conversion_changed(copies):
    base, converted = copies
    tokenizer = json.loads((converted / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (converted / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="makes other tokens"):
        validate(base, converted, load_text("builtin"), None, **SMALL)


def test_text_too_short(base, converted, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(DataError, match=r"file short\.txt, validation part: \d+ tokens are too few"):
        validate(base, converted, load_text(str(tmp_path / "short.txt")), None, **SMALL)


def test_sequences_fit_the_positions_of_the_model(copies):
    base, converted = copies
    for folder in copies:
        edit_config(folder, max_position_embeddings=32)
    assert validate(base, converted, load_text("builtin"), None, **SMALL).perplexity.tokens == 3 * 31


def test_unknown_device_and_dtype(base):
    with pytest.raises(SaConvertError, match="Device teapot is not available"):
        place(base, "teapot")
    with pytest.raises(SaConvertError, match="int8 is not a dtype to compute in"):
        place(base, "cpu", "int8")
