"""`sa-convert bench`: its counts against counts made here, its ratios against its runs, and what it refuses.

No test looks at how long anything takes.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from sa_convert.domain.benchmark import Spread
from sa_convert.domain.model import RunOptions
from sa_convert.errors import CheckpointError, OutputError, SaConvertError
from sa_convert.jobs.benchmarking import bench
from sa_convert.measure.speed import peak_memory as memory
from sa_convert.measure.speed.expected_work import Attention, attention_layers, prefill_flops, step_bytes
from sa_convert.measure.speed.parameters_read import parameters_read, weights_of
from sa_convert.measure.speed.process import workers
from sa_convert.measure.speed.request import BenchOptions, contexts_of
from sa_convert.measure.speed.runner import Runner
from sa_convert.measure.speed.turns import block_sizes
from sa_convert.measure.speed.worker import _explained
from sa_convert.models.arguments import cache_keyword, cache_of
from sa_convert.models.subject import open_subject
from sa_convert.plan.audited import foreign_code
from sa_convert.read.folder import read_config
from sa_convert.read.open_model import open_model
from support.cli_cases import refused
from support.processes import ROOT, run_cli
from support.tiny_models import save_tiny
from support.validation_models import VOCABULARY, save_base, save_converted

SMALL = BenchOptions(contexts=(8,), batches=(1,), steps=3, repeats=2, device="cpu", threads=1)
# The tiny Llama of validation_models: 5 layers, 2 of which share in the converted one.
HIDDEN, INNER, DEPTH, REUSING, HEADS, GROUPS, SIZE = 64, 96, 5, 2, 4, 2, 16


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def converted(base) -> Path:
    return save_converted(base, base.parent / "converted")


def hand_counts(reusing: int, context: int, batch: int) -> tuple[int, int, int]:
    """Cache bytes, FLOPs of a prefill and bytes of a step of the tiny Llama, from its dimensions alone."""
    queries, keys = HEADS * SIZE, GROUPS * SIZE
    matrices = DEPTH * (HIDDEN * (2 * queries + 2 * keys) + 3 * HIDDEN * INNER) - reusing * HIDDEN * (queries + keys)
    norms, head = (2 * DEPTH + 1) * HIDDEN, VOCABULARY * HIDDEN
    cache = 4 * batch * context * (2 * DEPTH - reusing) * keys
    pairs = context * (context + 1) // 2
    scores, values = (DEPTH - reusing) * queries * pairs, DEPTH * queries * pairs
    flops = 2 * batch * (matrices * context + head + scores + values)
    return cache, flops, 4 * (matrices + norms + head) + cache + 4 * batch * reusing * HEADS * context


def test_against_its_base_as_a_process(base, converted, tmp_path):
    folder, temporary = tmp_path / "out", tmp_path / "temporary"
    temporary.mkdir()
    arguments = [
        "bench", converted, "--against", base, "--contexts", "12,40", "--batches", "1,3", "--new-tokens", 10,
        "--repeats", 3, "--threads", 1, "--device", "cpu", "--json", "-o", folder,
    ]  # fmt: skip
    result = run_cli(*arguments, env={"TMPDIR": str(temporary)})
    assert result.returncode == 0, result.stderr
    assert not list(temporary.iterdir())
    found = json.loads(result.stdout)
    assert json.loads((folder / "bench.json").read_text()) == found
    assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "bench.md", "bench.png"]
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert (found["model"]["id"], found["against"]["id"]) == ("converted", "base")
    made = found["conditions"]
    assert (made["dtype"], made["threads"], made["cache"], made["new_tokens"]) == ("float32", 1, "dynamic", 10)
    results = found["results"]
    assert [(row["context"], row["batch"]) for row in results] == [(12, 1), (12, 3), (40, 1), (40, 3)]
    for row in results:
        counts = {}
        for key, reusing in (("model", REUSING), ("against", 0)):
            counts[key] = hand_counts(reusing, row["context"], row["batch"])
            assert row[key]["cache_bytes"] == counts[key][0]
            assert row[key]["expected_prefill_flops"] == counts[key][1]
            assert row[key]["expected_step_bytes"] == counts[key][2]
            assert row[key]["peak_memory"] > found[key]["weight_bytes"]
            step, prefill = row[key]["step_seconds"], row[key]["prefill_seconds"]
            assert (len(prefill["runs"]), len(step["runs"])) == (3, 6)  # 10 steps are 2 blocks of 5
            assert row[key]["step_tokens_per_second"] == pytest.approx(row["batch"] / step["median"], rel=1e-4)
            tokens = row["batch"] * row["context"]
            assert row[key]["prefill_tokens_per_second"] == pytest.approx(tokens / prefill["median"], rel=1e-4)
        for index, key in ((1, "prefill"), (2, "step")):
            assert row["expected"][key] == pytest.approx(counts["model"][index] / counts["against"][index], rel=1e-5)
            assert row["expected"][key] < 1
            mine, theirs = (row[side][f"{key}_seconds"]["runs"] for side in ("model", "against"))
            pairs = [a / b for a, b in zip(mine, theirs, strict=True)]
            ratio = row["ratio"][key]
            assert ratio["median"] == pytest.approx(median(pairs), rel=1e-4)
            assert ratio["quartiles"] == pytest.approx(np.percentile(pairs, [25, 75]).tolist(), rel=1e-4)
            assert ratio["runs"] == pytest.approx(pairs, rel=1e-4)
        assert row["ratio"]["cache_bytes"] == pytest.approx(0.8)
        peaks = row["model"]["peak_memory"] / row["against"]["peak_memory"]
        assert row["ratio"]["peak_memory"] == pytest.approx(peaks, rel=1e-5)
    page = (folder / "bench.md").read_text()
    assert "| 40 | 3 | prefill |" in page
    assert "float32 on cpu" in page


def test_a_model_against_itself(base, tmp_path):
    found = bench(str(base), str(base), SMALL, tmp_path / "out")
    (pairing,) = found.pairings
    assert (pairing.expected_prefill, pairing.expected_step, pairing.cache_ratio) == (1, 1, 1)
    assert found.model == found.against
    with pytest.raises(OutputError, match="out: exists already"):
        bench(str(base), str(base), SMALL, tmp_path / "out")


def test_cache_bytes_are_those_of_a_real_cache(base, converted):
    for folder, reusing in ((base, 0), (converted, REUSING)):
        model = loaded(folder)
        with torch.inference_mode():
            cache = cache_of(model(torch.arange(24).view(2, 12), use_cache=True))
            runner = Runner(model, "next-token", False, 0)
            runner.begin(12, 2, 1)
            runner.prefill()
        real = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
        assert runner.cache_bytes() == real == hand_counts(reusing, 12, 2)[0]


def loaded(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


class Calls:
    """A model that keeps what it was called with, and what it said."""

    def __init__(self, model):
        self.model, self.calls, self.outputs = model, [], []
        model.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs, output):
        self.calls.append({key: value for key, value in kwargs.items() if key != cache_keyword(module)})
        self.outputs.append(output.logits[:, -1])


@pytest.mark.parametrize("static", [False, True])
def test_decoding_continues_the_prefill(base, static):
    """Each step says what one pass over all tokens so far would say."""
    model = loaded(base)
    told = Calls(model)
    with torch.inference_mode():
        runner = Runner(model, "next-token", static, 3)
        runner.begin(9, 2, 4)
        runner.prefill()
        for _ in range(4):
            runner.step()
        tokens = torch.cat([call["input_ids"] for call in told.calls], dim=1)
        outputs = torch.stack(told.outputs, dim=1)
        whole = model(tokens, use_cache=False).logits[:, 8:]
    assert tokens.shape == (2, 13)
    assert not torch.isin(tokens, torch.tensor([0, 1])).any()  # the special tokens of the model
    assert len(set(tokens.flatten().tolist())) > 15
    torch.testing.assert_close(outputs, whole, atol=1e-4, rtol=1e-4)
    if static:
        assert runner.cache_bytes() == hand_counts(0, 13, 2)[0]


def test_encoder_decoders_and_encoders(tmp_path):
    save_tiny("t5", tmp_path / "t5")
    save_tiny("bert", tmp_path / "bert")
    from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5").eval()
    with torch.inference_mode():
        runner = Runner(model, "teacher-forced", False, 0)
        runner.begin(6, 2, 2)
        runner.prefill()
        config = model.config
        per_token = 4 * config.num_decoder_layers * 2 * config.num_heads * config.d_kv
        assert runner.cache_bytes() == 2 * 6 * 2 * per_token  # own and cross-attention, 2 sequences of 6 tokens
        read = {id(parameter) for parameter in parameters_read(model, runner.step)}
        runner.step()
        assert runner.cache_bytes() == 2 * (6 * 2 + 2) * per_token
    names = {name for name, parameter in model.named_parameters() if id(parameter) in read}
    assert not any(name.startswith("encoder.") for name in names)
    assert not any(name.endswith(("EncDecAttention.k.weight", "EncDecAttention.v.weight")) for name in names)
    assert "decoder.block.0.layer.1.EncDecAttention.q.weight" in names
    assert any("DenseReluDense.wi" in name for name in names)
    layers = attention_layers(open_model(str(tmp_path / "t5")), False)
    decoder = config.num_decoder_layers
    kinds = [(False, False)] * config.num_layers + [(True, True)] * decoder + [(False, True)] * decoder
    assert [(layer.causal, layer.cached) for layer in layers] == kinds

    encoder = AutoModelForMaskedLM.from_pretrained(tmp_path / "bert").eval()
    with torch.inference_mode():
        runner = Runner(encoder, "masked-token", False, 0)
        runner.begin(6, 2, 0)
        weights = weights_of(encoder, runner.prefill, None, False)
    assert weights.step_bytes is None
    assert step_bytes(weights, (), cache=None, context=6, batch=2, itemsize=4) is None
    layers = attention_layers(open_model(str(tmp_path / "bert")), False)
    assert not any(layer.causal for layer in layers)


def test_weights_that_are_read(tmp_path):
    """Looked-up embeddings are not counted, a tied output embedding is, and so are all experts."""
    save_tiny("mixtral", tmp_path / "model", tie_word_embeddings=True, sliding_window=None)
    model = loaded(tmp_path / "model")
    with torch.inference_mode():
        runner = Runner(model, "next-token", False, 0)
        runner.begin(4, 1, 1)
        weights = weights_of(model, runner.prefill, runner.step, runner.keeps_one)
    assert weights.experts
    assert weights.keeps_one
    assert weights.step_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert weights.head == model.model.embed_tokens.weight.numel()
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    assert weights.matrices == weights.step_bytes // 4 - weights.head - vectors
    save_tiny("llama", tmp_path / "untied", tie_word_embeddings=False)
    model = loaded(tmp_path / "untied")
    with torch.inference_mode():
        read = parameters_read(model, lambda: model(torch.arange(3)[None]))
    every = dict(model.named_parameters())
    assert {id(parameter) for parameter in read} == {
        id(parameter) for name, parameter in every.items() if name != "model.embed_tokens.weight"
    }


@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize("context", [1, 2, 7])
def test_pairs_in_view(window, context):
    layer = Attention(4, 4, 8, 8, window, True, True)
    seen = [
        (query, key) for query in range(context) for key in range(query + 1) if window is None or query - key < window
    ]
    assert layer.pairs(context) == len(seen)


def test_expectations_of_single_heads_and_windows(tmp_path):
    """A borrowed head reads probabilities and computes no scores; a family unknown has no FLOPs of attention."""
    weights = weights_of_nothing()
    layer = Attention(heads=4, own=3, size=8, value_size=6, window=5, causal=True, cached=True)
    assert prefill_flops(weights, (layer,), 2, 3) == 2 * 3 * (10 * 2 + 7 + 3 * (3 * 8 + 4 * 6))
    assert step_bytes(weights, (layer,), cache=1000, context=64, batch=2, itemsize=2) == 100 + 1000 + 2 * 1 * 5 * 2
    assert prefill_flops(weights, None, 2, 3) is None
    folder = tmp_path / "model"
    folder.mkdir()
    save_tiny("llama", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    assert attention_layers(open_model(str(folder)), False) is None


def weights_of_nothing():
    from sa_convert.measure.speed.parameters_read import Weights

    return Weights(matrices=10, head=7, keeps_one=True, step_bytes=100, experts=False)


def test_spread_and_blocks():
    spread = Spread((4.0, 1.0, 3.0, 2.0, 10.0))
    assert spread.median == 3
    assert spread.quartiles == tuple(np.percentile(spread.runs, [25, 75]))
    assert Spread((2.0,)).quartiles == (2, 2)
    assert [block_sizes(steps) for steps in (0, 1, 8, 9, 32)] == [[], [1], [8], [5, 4], [8, 8, 8, 8]]


def test_peak_memory_is_forgotten(monkeypatch):
    size = 64_000_000
    meter = memory.PeakMemory("cpu")
    if meter.kind != memory.RESIDENT:
        pytest.skip("the kernel does not let a process forget its peak here")
    meter.reset()
    start = meter.read()
    block = bytearray(os.urandom(1)) * size
    assert meter.read() - start > 0.95 * size  # the kernel counts in batches
    del block
    meter.reset()
    assert meter.read() - start < size / 2
    monkeypatch.setattr(memory, "_forget_peak", lambda: False)
    meter = memory.PeakMemory("cpu")
    block = bytearray(os.urandom(1)) * size
    del block
    meter.reset()
    assert meter.kind == memory.SINCE_START
    assert meter.read() - start > 0.95 * size


def test_models_that_cannot_be_compared(base, tmp_path):
    other = save_base(tmp_path / "other", vocab_size=VOCABULARY + 4)
    with pytest.raises(CheckpointError, match="other and base have different vocabularies, of 304 and 300 tokens"):
        bench(str(other), str(base), SMALL)
    save_tiny("mistral", tmp_path / "mistral")
    with pytest.raises(CheckpointError, match="mistral is of type mistral and base of type llama"):
        bench(str(tmp_path / "mistral"), str(base), SMALL)
    save_tiny("bert", tmp_path / "bert")
    static = BenchOptions(**{**vars(SMALL), "static": True})
    with pytest.raises(SaConvertError, match="--cache static: bert does masked-token prediction"):
        bench(str(tmp_path / "bert"), str(tmp_path / "bert"), static)


def test_contexts_and_positions(base, tmp_path):
    def subject(folder):
        return open_subject(str(folder), tmp_path / "workspace", RunOptions(), foreign_code)

    with pytest.raises(SaConvertError, match=r"base: a context of 254 and 3 new tokens is more than .* 256 positions"):
        bench(str(base), str(base), BenchOptions(**{**vars(SMALL), "contexts": (8, 254)}))
    small = save_tiny("llama", tmp_path / "small", max_position_embeddings=2100)
    assert small is not None
    assert contexts_of(BenchOptions(), [subject(base), subject(tmp_path / "small")], 32) == ([128], [512, 2048, 4096])
    assert contexts_of(BenchOptions(), [subject(tmp_path / "small")], 60) == ([128, 512], [2048, 4096])
    save_tiny("llama", tmp_path / "smallest", max_position_embeddings=64)
    with pytest.raises(SaConvertError, match=r"smallest: .* 64 positions: give smaller --contexts or --new-tokens"):
        contexts_of(BenchOptions(), [subject(tmp_path / "smallest")], 32)


def test_wrong_usage(base, tmp_path):
    for values in ("0", "8,-1", "x", ""):
        result = run_cli("bench", base, "--against", base, "--contexts", values)
        assert result.returncode == 2
        assert "--contexts" in result.stderr
    refused(run_cli("bench", base, "--against", tmp_path / "none"), 1, "none: there is no such folder")
    away = tmp_path / "away" / "out"
    refused(run_cli("bench", base, "--against", base, "-o", away), 1, r"away: there is no such folder", away.parent)


def test_what_goes_wrong_in_a_process(base, tmp_path):
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    with workers(["base"]) as (worker,):
        with pytest.raises(SaConvertError, match="base: cannot be run: "):
            worker.ask("begin", context=1, batch=1, steps=1)  # nothing is loaded
        with pytest.raises(CheckpointError, match="no weights"):
            worker.ask("load", **load_request(tmp_path))
        worker._process.kill()
        with pytest.raises(SaConvertError, match=r"base: the process that ran it was killed, .* lack of memory"):
            worker.ask("end")
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("x"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):
        assert "not enough memory" in _explained("base", error)


def load_request(folder: Path) -> dict:
    subject = {
        "name": "base",
        "folder": str(folder),
        "config": read_config(folder),
        "converted": False,
        "trusted": False,
    }
    return {"subject": subject, "options": {"device": "cpu", "threads": 1}}


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_no_process_stays(base, tmp_path, ending):
    """Whatever ends the command, its processes end, too."""
    command = [sys.executable, "-m", "sa_convert", "bench", base, "--against", base, "--contexts", "64"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    output = ["--repeats", "100000", "-o", tmp_path / "out"]
    process = subprocess.Popen(
        [*map(str, [*command, *output])], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        seen = ""
        while "timing" not in seen:
            letters = process.stderr.read(1)
            assert letters, seen
            seen += letters
        children = psutil.Process(process.pid).children(recursive=True)
        assert len([child for child in children if "sa_convert.measure.speed.worker" in child.cmdline()]) == 2
        process.send_signal(ending)
        # The progress bar would fill the pipe.
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    if ending == signal.SIGINT:
        assert process.returncode == 1
        assert not list(tmp_path.iterdir())
        assert stderr.strip().splitlines()[-1] == "Error: Interrupted; nothing was written."
    assert "Traceback" not in stderr
    assert stdout == ""
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
