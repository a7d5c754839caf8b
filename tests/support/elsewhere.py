"""Converted folders under other releases of transformers: made here, run there by `on_transformers.py`, compared."""

import json
import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from support.on_transformers import WAYS
from support.processes import run_cli
from support.tiny_models import geometry_of_folder, make_map, save_tiny, write_recipe

MINIMUM = (
    "llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "falcon", "bloom", "bert", "t5", "bart", "mixtral",
    "qwen3_next", "gpt_oss",
)  # fmt: skip
"""Families that are run on every release: each does something that the others do not."""

OPTIONS = {"gpt2": {"scale_attn_by_inverse_layer_idx": False}}
"""Of configurations, in place of those of tiny models: 4.57 leaves this one out under SDPA, in every GPT-2."""

KINDS = ("span", "groups", "heads")
LOGITS = 1e-4
"""Largest difference of a logit (float32) that counts as equal."""

Folders = dict[tuple[str, str], str]
"""(family, kind of map, or "base") -> folder."""


def make_folders(root: Path, wanted: Mapping[str, Iterable[str]]) -> Folders:
    """A tiny random model of each family, and what the command line makes of it with a random map of each kind."""
    folders = {}
    for family, kinds in wanted.items():
        save_tiny(family, root / family, **OPTIONS.get(family, {}))
        folders[family, "base"] = str(root / family)
        for kind in kinds:
            geometry = geometry_of_folder(root / family)
            rows = make_map(kind, geometry, seed=3)
            recipe = write_recipe(root / f"{family}-{kind}.json", rows, geometry.stacks)
            out = root / f"{family}-{kind}"
            done = run_cli("convert", root / family, "--recipe", recipe, "-o", out, "--no-validate")
            assert done.returncode == 0, done.stderr
            folders[family, kind] = str(out)
    return folders


def make_job(folders: Iterable[str], ways: Iterable[str] = tuple(WAYS)) -> dict:
    torch.manual_seed(4)
    ids = torch.randint(3, 128, (2, 14))
    return {"folders": list(folders), "ids": ids.tolist(), "new_tokens": 10, "ways": list(ways)}


def run_elsewhere(python: str, job: dict, root: Path, packages: Path | None = None) -> dict:
    """What `on_transformers.py` finds, run by this Python in `root`. packages: where it looks for packages first."""
    root.mkdir(exist_ok=True)
    (root / "job.json").write_text(json.dumps(job))
    left_out = ("PYTHONPATH", "HF_MODULES_CACHE")
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    environment |= {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONPATH": str(packages)} if packages else {}
    program = Path(__file__).with_name("on_transformers.py")
    command = [python, str(program), str(root / "job.json"), str(root / "results.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    return json.loads((root / "results.json").read_text())


def difference(found: dict, expected: dict, base: dict, base_expected: dict) -> str | None:
    """What tells a folder's results (of `on_transformers.attempt`) from those expected; None if nothing does.

    base, base_expected: the same of the base model, which two releases may compute differently. Then the folder's
    logits may differ by three times as much, and by no more than that. A static cache is not looked at.
    """
    for result in (found, found.get("cached"), found.get("uncached")):
        if isinstance(result, dict) and "error" in result:
            return result["error"]
    if "absent" in found:
        return f"no {found['absent']} there"
    for way in ("cached", "uncached"):
        if way in expected and found[way] != expected["cached"]:
            return f"other tokens, {way}"
    apart = _apart(found, expected)
    allowed = LOGITS
    if apart > LOGITS:
        versions = _apart(base, base_expected) if "logits" in base else 0.0
        allowed = max(LOGITS, 3 * versions if versions < 0.01 else 0.0)
    return None if apart <= allowed else f"logits differ by {apart:.2g}"


def _apart(found: dict, expected: dict) -> float:
    return (torch.tensor(found["logits"]) - torch.tensor(expected["logits"])).abs().max().item()
