"""Measures `sa-convert convert --no-validate` against `cp -r` of the same folder.

    python docs/benchmarks/rewrite.py [--sizes 1 4] [--runs 7] [--folder DIR] [--write]

Builds a synthetic sharded Llama of each size (GiB) in a temporary folder of DIR, then runs the two commands
alternately, each as a process of its own, and reports medians of wall time and the peak memory of the converter. Before
every run the source is read once, so that both find it in the page cache, the output of the run before is deleted, and
all dirty pages are written out. `--write` puts the result into rewrite.md beside this file. Needs about 2.1 times the
largest size on disk.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.make_checkpoint import llama_config, llama_tensors, write_model  # noqa: E402

SHARDS = 16
LAYER_MIB, EMBEDDINGS_MIB = 128, 256
LIMIT_MIB = 200

RECIPE = """description: As many layers as the paper shares of Llama-2-7B, one in eight
sharing:
  spans:
    - {{layers: {first}-{last}, source: {source}}}
refit: none
gate: {{max_perplexity_increase: 10%}}
"""

CHECK = """
import sys
from sa_convert.commands.main import run
status = run(sys.argv[1:])
heavy = [name for name in ("torch", "transformers", "safetensors") if name in sys.modules]
sys.exit(f"loaded {', '.join(heavy)}" if heavy else status)
"""


@dataclass
class Result:
    """Of one size. Seconds of each run; peak memory of the converter in MiB, the largest of all runs."""

    gib: int
    copy: list[float] = field(default_factory=list)
    convert: list[float] = field(default_factory=list)
    peak: float = 0.0


def build(folder: Path, gib: int) -> tuple[Path, Path]:
    """A Llama of bfloat16 with random bytes, and a recipe for it."""
    layers = (gib * 1024 - EMBEDDINGS_MIB) // LAYER_MIB
    config = llama_config(layers, hidden=2048, heads=16, groups=16, intermediate=8192, vocabulary=32768)
    model = write_model(folder / f"model-{gib}", config, llama_tensors(config), SHARDS)
    recipe = folder / f"recipe-{gib}.yaml"
    borrowing = max(layers // 8, 1)
    last = layers - 2
    recipe.write_text(RECIPE.format(first=last - borrowing + 1, last=last, source=last - borrowing))
    return model, recipe


def timed(command: list[str], source: Path, output: Path) -> tuple[float, float]:
    """Wall seconds and peak memory (MiB) of a process that writes `output`."""
    shutil.rmtree(output, ignore_errors=True)
    for file in sorted(source.iterdir()):
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 20):
                pass
    os.sync()
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {child.returncode}")
    return seconds, usage.ru_maxrss / 1024


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def conversion(model: Path, recipe: Path, output: Path) -> list[str]:
    return ["convert", str(model), "--recipe", str(recipe), "-o", str(output), "--no-validate"]


def measure(folder: Path, gib: int, runs: int) -> Result:
    model, recipe = build(folder, gib)
    copied, converted = folder / "copied", folder / "converted"
    arguments = conversion(model, recipe, converted)
    subprocess.run([sys.executable, "-c", CHECK, *arguments], check=True, env=environment(), stdout=subprocess.DEVNULL)
    result = Result(gib)
    for run in range(runs):
        for convert in (False, True) if run % 2 else (True, False):
            if convert:
                seconds, peak = timed([sys.executable, "-m", "sa_convert", *arguments], model, converted)
                result.convert.append(seconds)
                result.peak = max(result.peak, peak)
            else:
                result.copy.append(timed(["cp", "-r", str(model), str(copied)], model, copied)[0])
            shutil.rmtree(copied, ignore_errors=True)
            shutil.rmtree(converted, ignore_errors=True)
        print(f"{gib} GiB, run {run + 1}: cp {result.copy[-1]:.2f} s, convert {result.convert[-1]:.2f} s", flush=True)
    shutil.rmtree(model)
    return result


def table(results: list[Result]) -> str:
    lines = [
        "| size | `cp -r`, median (fastest to slowest) | `convert --no-validate` | peak memory of `convert` |",
        "|---|---|---|---|",
    ]
    for result in results:
        times = (
            f"{statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"
            for values in (result.copy, result.convert)
        )
        lines.append(f"| {result.gib} GiB | {' | '.join(times)} | {result.peak:.0f} MiB |")
    return "\n".join(lines)


def machine() -> str:
    version = subprocess.run(["cp", "--version"], capture_output=True, text=True).stdout.split("\n")[0]
    return (
        f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}, {version}, "
        f"{time.strftime('%Y-%m-%d')}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="sa-convert-benchmark-") as temporary:
        results = [measure(Path(temporary), gib, options.runs) for gib in options.sizes]
    text = f"{table(results)}\n\nMedians of {options.runs} runs of each, alternately; {machine()}."
    print(f"\n{text}")
    if options.write:
        page = Path(__file__).with_suffix(".md")
        before, mark, rest = page.read_text().partition("<!-- result -->\n")
        after = rest.partition("<!-- end -->")[2]
        page.write_text(f"{before}{mark}{text}\n<!-- end -->{after}")
    # Below a few GiB the start of Python alone takes as long as copying.
    slow = [r.gib for r in results if r.gib >= 4 and statistics.median(r.convert) > statistics.median(r.copy)]
    large = [r.gib for r in results if r.peak > LIMIT_MIB]
    if slow or large:
        raise SystemExit(f"Slower than cp -r at {slow} GiB; above {LIMIT_MIB} MiB at {large} GiB.")


if __name__ == "__main__":
    main()
