"""Runs in the second environment (transformers 4, no sa_convert): load folders by their own code and generate.

python on_transformers_4.py JOBS OUTPUT; JOBS is a JSON file: {"folders": [...], "ids": [[...]], "new_tokens": N}
"""

import json
import sys
from pathlib import Path

import torch
import transformers

assert transformers.__version__.startswith("4."), transformers.__version__
assert "sa_convert" not in sys.modules


def attempt(folder, job):
    config = json.loads((Path(folder) / "config.json").read_text())
    name = config["architectures"][0].removeprefix("SharedAttention")
    if not hasattr(transformers, name):
        return {"absent": name}
    named = [key for key in config.get("auto_map", ()) if key.startswith("AutoModel")]
    model, info = getattr(transformers, named[0] if named else name).from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    missing = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if missing:
        return {"error": f"keys do not fit: {missing}"}
    model.eval()
    ids = torch.tensor(job["ids"])
    generates = model.can_generate() and not name.endswith("ForMaskedLM")  # 4 says so of some encoders
    inputs = {"use_cache": False} if generates else {}
    inputs |= {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found = {"logits": model(ids, **inputs).logits[:, -1].tolist()}
    if not generates:
        return found
    options = {"max_new_tokens": job["new_tokens"], "do_sample": False, "attention_mask": torch.ones_like(ids)}
    for way, extra in (
        ("cached", {}),
        ("uncached", {"use_cache": False}),
        ("static", {"cache_implementation": "static"}),
    ):
        try:
            found[way] = model.generate(ids, **options, **extra).tolist()
        except Exception as error:
            found[way] = f"{type(error).__name__}: {error}"
    return found


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
