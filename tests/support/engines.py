"""Engines, which live in an environment of their own: jobs for them, and what transformers makes of the same."""

import json
import os
import random
import subprocess

from support.processes import ROOT, run_cli
from support.tiny_models import save_tiny, save_tokenizer

SIZES = {"hidden_size": 128, "head_dim": 32, "num_attention_heads": 8, "num_key_value_heads": 4}
"""Kernels of vLLM for CPUs have heads of 32 numbers and more."""

CHANGES = {"mistral": {"sliding_window": 40}, "gemma3_text": {"query_pre_attn_scalar": 32, "sliding_window": 40}}
"""Windows of the family's own that texts of the tests are longer than."""


def random_prompts(lengths, seed=0):
    chance = random.Random(seed)
    return [[chance.randrange(3, 110) for _ in range(length)] for length in lengths]


def convert_tiny(root, family, name, plan, engine="transformers", **changes):
    """A converted tiny model. plan: {layer: "drop", or {KV group: {treatment: arguments}}}. engine: what it is for.
    changes: of the base, which is another one then."""
    base, out = root / f"{family}-base{'-changed' * bool(changes)}", root / f"{family}-{name}"
    if not base.exists():
        save_tiny(family, base, **SIZES, **CHANGES.get(family, {}), **changes)
        save_tokenizer(base)
    if out.exists():
        return out
    lines = [f"  {layer}: {json.dumps(told)}".replace('"', "").replace(":", ": ") for layer, told in plan.items()]
    recipe = root / f"{family}-{name}.yaml"
    recipe.write_text("\n".join([f"for: {engine}", "plan:", *lines, ""]))
    result = run_cli("convert", base, "--recipe", recipe, "-o", out, "--no-validate")
    assert result.returncode == 0, result.stderr
    return out


def job(folder, rounds, new=24, logprobs=None, **options):
    """What vLLM is to make of rounds of prompts: see engine_job.py."""
    return {"folder": str(folder), "rounds": rounds, "new": new, "options": options, "logprobs": logprobs}


def serve(jobs, plugins=None, environment=()):
    """What vLLM makes of jobs, by name. plugins: which of vLLM's plugins run, None: all."""
    extra = {"VLLM_PLUGINS": plugins} if plugins is not None else {}
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VLLM_PLUGINS")}
    result = subprocess.run(
        [os.environ["SA_CONVERT_ENGINES"], ROOT / "tests" / "support" / "engine_job.py"],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        env={**kept, **extra, **dict(environment)},
    )
    found = _results(result)
    assert set(found) == set(jobs), result.stderr[-3000:]
    if len(jobs) == 1 and "error" in (told := next(iter(found.values()))):
        told["log"] = result.stdout + result.stderr  # where processes of an engine say why they ended
    return found


def export(jobs):
    """What programs made of folders compute, by name: see export_job.py."""
    result = subprocess.run(
        [os.environ["SA_CONVERT_EXPORTS"], ROOT / "tests" / "support" / "export_job.py"],
        input=json.dumps({" ".join(name): job for name, job in jobs.items()}),
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    found = {tuple(name.split()): told for name, told in _results(result).items()}
    assert set(found) == set(jobs), result.stderr[-3000:]
    return found


def _results(process):
    lines = [line for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    return dict(json.loads(line.removeprefix("RESULT ")) for line in lines)


def generated(folder, rounds, new=24):
    """Greedy tokens of the folder's own code in transformers, one prompt at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    options = {"do_sample": False, "max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
    found = []
    for prompts in rounds:
        given = [torch.tensor([ids]) for ids in prompts]
        outputs = [model.generate(ids, attention_mask=torch.ones_like(ids), **options) for ids in given]
        found.append([output[0, len(ids) :].tolist() for output, ids in zip(outputs, prompts, strict=True)])
    return found
