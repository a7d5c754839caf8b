"""Runs in any environment: load folders by their own code, with the transformers that is there, and generate.

python on_transformers.py JOB RESULTS

JOB is a JSON file: {"folders": [...], "ids": [[...]], "new_tokens": N, "ways": [...]}, the last being names of WAYS.
RESULTS becomes one: {"transformers": version, "found": {folder: what `attempt` returns}}.
"""

import json
import re
import sys
import traceback
from pathlib import Path

import torch
import transformers

WAYS = {"cached": {}, "uncached": {"use_cache": False}, "static": {"cache_implementation": "static"}}


def attempt(folder, job):
    """The last logits (B, V) without a cache, and for each way the tokens (B, T) that the model generates.

    {"logits": ..., "cached": ..., ...}; in place of the tokens of a way, or of all, a `failure`. {"absent": class} if
    this transformers does not have the model's base class.
    """
    try:
        return _attempt(folder, job)
    except Exception as error:
        return failure(error)


def _attempt(folder, job):
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
        return {"error": f"keys do not fit: {missing}", "refused": False}
    if "auto_map" in config and not type(model).__module__.startswith("transformers_modules."):
        return {"error": f"loaded by {type(model).__module__}, not by its own code", "refused": False}
    model.eval()
    ids = torch.tensor(job["ids"])
    generates = model.can_generate() and not name.endswith("ForMaskedLM")  # 4 says so of some encoders
    inputs = {"use_cache": False} if generates else {}
    inputs |= {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found = {"logits": model(ids, **inputs).logits[:, -1].tolist()}
    options = {"max_new_tokens": job["new_tokens"], "do_sample": False, "attention_mask": torch.ones_like(ids)}
    for way in job["ways"] if generates else ():
        try:
            found[way] = model.generate(ids, **options, **WAYS[way]).tolist()
        except Exception as error:
            found[way] = failure(error)
    return found


def failure(error):
    """{"error": type and message, "refused": bool}. Refused: the folder's own code raised it, and says for which
    releases of transformers it was made."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = bool(frames) and frames[-1].startswith("transformers_modules.")
    return {
        "error": f"{type(error).__name__}: {error}",
        "refused": own and re.search(r"transformers\b.*\d", str(error)) is not None,
    }


def main(job, results):
    # Nothing that a folder does may lean on the package, even if it is installed here.
    assert "sa_convert" not in sys.modules
    sys.modules["sa_convert"] = None
    job = json.loads(Path(job).read_text())
    found = {folder: attempt(folder, job) for folder in job["folders"]}
    Path(results).write_text(json.dumps({"transformers": transformers.__version__, "found": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
