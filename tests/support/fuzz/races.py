"""Two `convert` into one destination at once: one whole model is there at the end, and both say what became of them."""

import json
import os
import random
import shutil
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from support.fuzz.judge import incomplete
from support.fuzz.kills import PATIENCE, command, start

RECIPES = ("sharing: {spans: [{layers: 50%-100%}]}\n", "sharing: {spans: [{layers: 75%-100%}]}\n")
"""Two that give different maps, so that a mixture of both shows."""


@dataclass
class Races:
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return self.outcomes.total()


def run_races(model: Path, rounds: int, seed: int, folder: Path, deadline: float) -> Races:
    """Half of the rounds with --overwrite, half of these over an earlier output."""
    result = Races()
    recipes = []
    for number, text in enumerate(RECIPES):
        recipes.append(folder / f"recipe-{number}.yaml")
        recipes[-1].write_text(text)
    for number in range(rounds):
        if time.monotonic() > deadline:
            break
        place = folder / f"round-{number}"
        place.mkdir()
        _race(model, recipes, random.Random(f"{seed}:{number}"), number, place, result)
        shutil.rmtree(place)
    return result


def _race(model: Path, recipes: list[Path], chance: random.Random, number: int, folder: Path, result: Races) -> None:
    output, overwrite = folder / "out", number % 2 == 1
    options = ["--no-validate", *(["--overwrite"] if overwrite else [])]
    if number % 4 == 3:
        done = start(command(model, recipes[0], output, *options))
        done.communicate(timeout=PATIENCE)
    children = []
    for recipe in chance.sample(recipes, 2):
        children.append(start(command(model, recipe, output, *options)))
        time.sleep(chance.choice((0, 0, chance.random() * 0.3)))
    said = [child.communicate(timeout=PATIENCE)[1] for child in children]
    problem = _wrong(output, folder, children, said, overwrite)
    if problem is not None:
        result.findings.append(f"round {number}{' with --overwrite' if overwrite else ''}: {problem}")
    won = sum(child.returncode == 0 for child in children)
    ends = {2: "both succeed, the later one stays", 1: "one succeeds, the other is refused", 0: "both are refused"}[won]
    result.outcomes[f"{'with' if overwrite else 'without'} --overwrite: {ends}"] += 1


def _wrong(
    output: Path, folder: Path, children: list[subprocess.Popen], said: list[str], overwrite: bool
) -> str | None:
    for child, err in zip(children, said, strict=True):
        last = err.strip().replace("\r", "\n").splitlines()[-1] if err.strip() else ""
        if "Traceback" in err or "Unexpected" in err or child.returncode not in (0, 1):
            return f"exit status {child.returncode}: {err[-1000:]}"
        if child.returncode == 1 and not (last.startswith("Error: ") and str(output) in last):
            return f"an unclear last line: {last}"
    won = sum(child.returncode == 0 for child in children)
    if won == 0 or (won == 2 and not overwrite):
        return f"{won} of two succeed: {said}"
    if os.listdir(folder) != ["out"]:
        return f"left: {os.listdir(folder)}"
    return incomplete(output) or _mixed(output)


def _mixed(output: Path) -> str | None:
    """The map in config.json, that in the recipe, and the tensors of borrowing layers agree."""
    import yaml
    from safetensors import safe_open

    shared = json.loads((output / "config.json").read_text())["shared_attention"]["layers"]
    recipe = yaml.safe_load((output / "recipe.yaml").read_text())["sharing"]["map"]
    if {int(layer) for layer in shared} != set(recipe):
        return "config.json and recipe.yaml come from different runs"
    queries = set()
    for file in output.glob("*.safetensors"):
        with safe_open(file, "numpy") as opened:
            queries |= {int(name.split(".")[2]) for name in opened.keys() if name.endswith("q_proj.weight")}  # noqa: SIM118
    depth = json.loads((output / "config.json").read_text())["num_hidden_layers"]
    return None if queries == set(range(depth)) - set(recipe) else "tensors and map come from different runs"
