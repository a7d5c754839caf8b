"""Runs in the second environment (transformers 4, no sa_convert): load folders by their own code and generate.

python on_transformers_4.py JOBS OUTPUT; JOBS is a JSON file: {"folders": [...], "ids": [[...]], "new_tokens": N}
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

assert transformers.__version__.startswith("4."), transformers.__version__
assert "sa_convert" not in sys.modules


def attempt(folder, job):
    config = json.loads((Path(folder) / "config.json").read_text())
    if not hasattr(transformers, config["architectures"][0].removeprefix("SharedAttention")):
        return {"absent": config["architectures"][0]}
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    missing = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if missing:
        return {"error": f"keys do not fit: {missing}"}
    model.eval()
    ids = torch.tensor(job["ids"])
    options = {"max_new_tokens": job["new_tokens"], "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, -1].tolist()
    if "shared_attention" not in config:
        return {"logits": logits}
    cached = model.generate(ids, **options)
    uncached = model.generate(ids, **options, use_cache=False)
    static = model.generate(ids, **options, cache_implementation="static")
    return {
        "cached": cached.tolist(),
        "uncached": uncached.tolist(),
        "static": static.tolist(),
        "logits": logits,
    }


def main(jobs, output):
    job = json.loads(Path(jobs).read_text())
    results = {}
    for folder in job["folders"]:
        try:
            results[folder] = attempt(folder, job)
        except Exception as error:
            results[folder] = {"error": f"{type(error).__name__}: {error}"}
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
