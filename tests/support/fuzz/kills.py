"""Ends `convert` at random times, and looks at what it leaves: nothing at the destination or a whole model, and after
one more run a whole model and nothing beside it.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from support.fuzz.judge import incomplete
from support.make_checkpoint import llama_config, llama_tensors, write_model

ROOT = Path(__file__).parents[3]
RECIPE = "sharing: {spans: [{layers: 50%-100%}]}\ngate: {max_perplexity_increase: 100%}\n"
PATIENCE = 300
"""Seconds for one run."""


@dataclass
class Kills:
    """What became of the killed runs: how often by signal, and how far they had come."""

    signals: Counter[str] = field(default_factory=Counter)
    reached: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return self.signals.total()


@dataclass(frozen=True)
class Scene:
    """What is converted. options: of convert. recipe: a file. seconds: how long a whole run takes."""

    model: Path
    recipe: Path
    options: tuple[str, ...]
    seconds: float


def large_model(folder: Path, megabytes: int) -> Path:
    """A Llama of about that size in 6 shards, whose copy takes a while."""
    layers = max(2, megabytes // 22)
    config = llama_config(layers, 1024, 16, 8, 2816, 2000)
    return write_model(folder, config, llama_tensors(config), 6)


def command(model: Path, recipe: Path, output: Path, *options: str) -> list[str]:
    arguments = ["convert", str(model), "--recipe", str(recipe), "-o", str(output), *options]
    return [sys.executable, "-m", "sa_convert", *arguments]


def start(arguments: Sequence[str], temporary: Path | None = None) -> subprocess.Popen:
    """temporary: a folder for temporary files, in place of the system's."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT))}
    environment |= {"TMPDIR": str(temporary)} if temporary else {}
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, stdin=subprocess.DEVNULL
    )


def measure(model: Path, recipe: Path, folder: Path, *options: str) -> Scene:
    """A scene, from one run that nobody ends. Raises AssertionError if it does not convert."""
    began = time.monotonic()
    done = start(command(model, recipe, folder / "measured", *options))
    _, err = done.communicate(timeout=PATIENCE)
    assert done.returncode == 0, err
    return Scene(model, recipe, options, time.monotonic() - began)


def run_kills(scenes: Sequence[tuple[Scene, int]], seed: int, folder: Path, processes: int, deadline: float) -> Kills:
    """Kill each scene so many times. deadline: of time.monotonic; kills after it are left out."""
    result = Kills()
    jobs = [(scene, f"{seed}:{at}:{number}") for at, (scene, count) in enumerate(scenes) for number in range(count)]
    random.Random(seed).shuffle(jobs)

    def one(job: tuple[Scene, str]) -> None:
        if time.monotonic() < deadline:
            scene, name = job
            place = folder / name.replace(":", "-")
            place.mkdir()
            _kill(scene, random.Random(name), place, name, result)

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(one, jobs))
    return result


def _kill(scene: Scene, chance: random.Random, folder: Path, name: str, result: Kills) -> None:
    """One kill, in an empty folder, which is gone afterwards."""
    output, number = folder / "out", chance.choice((signal.SIGKILL, signal.SIGTERM))
    overwrites = chance.random() < 0.4
    arguments = command(scene.model, scene.recipe, output, *scene.options)
    if overwrites:
        _earlier(output)
        arguments.append("--overwrite")
    (temporary := folder.with_name(f"{folder.name}-temporary")).mkdir()
    child = start(arguments, temporary)
    if chance.random() < 0.7:  # while it writes
        _await_stage(folder, child)
        time.sleep(chance.random() ** 2 * scene.seconds)
    else:
        time.sleep(chance.random() * scene.seconds)
    child.send_signal(number)
    _, err = child.communicate(timeout=PATIENCE)
    problem = _after(folder, output, overwrites, child.returncode, number, err, result)
    if problem is None and number is signal.SIGTERM and (left := os.listdir(temporary)):
        problem = f"SIGTERM leaves temporary files: {', '.join(left)}"
    if problem is None:
        problem = _rerun(scene, folder, output)
    if problem is not None:
        result.findings.append(f"{name}, {number.name}: {problem}")
    result.signals[number.name] += 1
    shutil.rmtree(folder)
    shutil.rmtree(temporary)


def _earlier(output: Path) -> None:
    output.mkdir()
    (output / "config.json").write_text('{"shared_attention": {"layers": {}}}')
    (output / "report.json").write_text("earlier")


def _await_stage(folder: Path, child: subprocess.Popen) -> None:
    while child.poll() is None and not any(name.startswith(".out.") for name in os.listdir(folder)):
        time.sleep(0.002)


def _after(
    folder: Path, output: Path, overwrites: bool, status: int, number: signal.Signals, err: str, result: Kills
) -> str | None:
    """What is wrong right after the kill."""
    names = sorted(os.listdir(folder))
    stages = [name for name in names if name != "out"]
    is_earlier = output.exists() and (output / "report.json").read_text() == "earlier"
    is_new = output.exists() and not is_earlier
    result.reached[_reached(status, stages, is_new)] += 1
    if is_new and (wrong := incomplete(output)):
        return f"the destination is not whole: {wrong}"
    if status == 0 and not is_new:
        return "it says that it is done, but nothing new is at the destination"
    if number is not signal.SIGKILL and stages:
        return f"SIGTERM leaves {', '.join(stages)}"
    if "Traceback" in err or "Unexpected" in err:
        return f"a traceback: {err[-1000:]}"
    if overwrites and not output.exists() and not any((folder / name / "put_aside").exists() for name in stages):
        return "the earlier output is lost"
    return None


def _reached(status: int, stages: list[str], is_new: bool) -> str:
    if status == 0:
        return "it was done already"
    if is_new:
        return "the new output was in place"
    return "the stage was left, for the next run to remove" if stages else "nothing was left"


def _rerun(scene: Scene, folder: Path, output: Path) -> str | None:
    """What is wrong after one more run, without validation, which nobody ends."""
    again = start(command(scene.model, scene.recipe, output, "--no-validate", "--overwrite"))
    _, err = again.communicate(timeout=PATIENCE)
    if again.returncode:
        return f"the next run fails: {err.strip().splitlines()[-1]}"
    left = [name for name in os.listdir(folder) if name != "out"]
    return f"left after the next run: {', '.join(left)}" if left else incomplete(output)
