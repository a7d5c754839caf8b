"""Makes the conversions whose quality in long context docs/quality.md compares.

    python docs/benchmarks/long_methods.py BASE DIR [--at 2048] [--only NAME,NAME]
    python docs/benchmarks/long.py BASE $(cat DIR/models.txt) --lengths 2048

BASE is SmolLM2-135M: plans name its 30 layers and 3 KV groups. Every method is calibrated on the product's calibration
text. A row that exists in DIR is not made again.

- `ours`: `sa-convert convert` with a search for 25, 50 and 75% of the cache, as the shipped recipes `light`, `balanced`
  and `aggressive` have it, but at the length in question.
- `kvzip`: windows of one size, on the KV groups whose score by KVzip (Kim et al., arXiv 2505.23416, scores of heads) is
  least; all others see everything, as DuoAttention (Xiao et al., arXiv 2410.10819) divides them. The score of a KV
  group is the most attention that any token of a context gets from the same context said once more, averaged over
  contexts.
- `low_rank`, `share`, `linear`, `drop`: each treatment alone. Keys of all KV groups at half of their rank; the shipped
  recipe `shared-balanced`; whole layers as docs/benchmarks/quality.py chose them for a quarter of the keys (NBL,
  LLM-Drop).
- `paper`: spans, heads by their index, as docs/benchmarks/quality.py chose them for a quarter of the keys.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

WINDOW = {"sinks": 4, "tokens": 256}
BUDGETS = (25, 50, 75)
CONTEXTS, CONTEXT = 8, 700
"""Pieces of text that KVzip's score is a mean over, and their tokens: every piece is read twice."""

RECIPES = {"ours:25": "light", "ours:50": "balanced", "ours:75": "aggressive"}
LOW_RANK = ", ".join(f"{group}: {{low_rank: {{keys: 32}}}}" for group in range(3))
PLANS = {
    "low_rank": "plan:\n" + "\n".join(f"  {layer}: {{{LOW_RANK}}}" for layer in range(30)),
    "linear": "plan: {7: linear, 25: linear, 28: linear, 29: linear}",
    "drop": "plan: {6: drop, 7: drop, 25: drop, 26: drop}",
    "paper": "sharing: {spans: [{layers: 22-25, source: 21}, {layers: 27-29, source: 26}]}",
}
"""Recipes that are told as they are, by the row."""


def run(*command: object) -> tuple[float, float]:
    """Seconds that a command took, and of processor time, which other work beside it changes less."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    begun, used = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-m", "sa_convert", *map(str, command)], env=environment, check=True)
    after = os.times()
    spent = after.children_user + after.children_system - used.children_user - used.children_system
    return time.perf_counter() - begun, spent


def kvzip_scores(base: Path) -> Any:
    """(layers, KV groups): the most attention that a token of a context gets when the context is said again."""
    import torch

    from sa_convert.domain.model import RunOptions
    from sa_convert.models.load import load_base, load_tokenizer
    from sa_convert.models.placement import placed
    from sa_convert.models.tokens import token_sequences
    from sa_convert.texts.text import load_text

    rows = token_sequences(load_tokenizer(base), load_text("builtin").split("calibration"), CONTEXTS, CONTEXT)
    total: Any = 0.0
    with load_base(base, placed(base, RunOptions(device="cpu", dtype="float32"))) as loaded:
        config = loaded.model.config
        loaded.model.set_attn_implementation("eager")
        groups = config.num_key_value_heads
        for row in rows:
            with torch.inference_mode():
                found = loaded.model(torch.cat([row, row])[None], output_attentions=True, logits_to_keep=1).attentions
            # (heads, CONTEXT said again, CONTEXT) of each layer; the first token is a sink for everyone
            again = [layer[0, :, CONTEXT:, 1:CONTEXT] for layer in found]
            total = total + torch.stack([layer.unflatten(0, (groups, -1)).amax((1, 2, 3)) for layer in again])
    return total / len(rows)


def kvzip_plan(scores: Any, part: float, at: int) -> str:
    """In YAML: windows on as many KV groups, the least score first, as save `part` of the cache at `at` tokens."""
    layers, groups = scores.shape
    saved = 1 - (WINDOW["sinks"] + WINDOW["tokens"]) / at
    count = round(part * layers * groups / saved)
    chosen: dict[int, dict[int, Any]] = {}
    for place in scores.flatten().argsort()[:count].tolist():
        chosen.setdefault(place // groups, {})[place % groups] = {"window": WINDOW}
    # YAML's flow style is JSON, but keys have to be numbers.
    lines = []
    for layer, plan in sorted(chosen.items()):
        inner = ", ".join(f"{group}: {json.dumps(told)}" for group, told in sorted(plan.items()))
        lines.append(f"  {layer}: {{{inner}}}")
    return "plan:\n" + "\n".join(lines) + "\n"


def recipes(base: Path, folder: Path, at: int) -> Iterator[tuple[str, str]]:
    """The name of each row, and its recipe: a file or the name of one that is shipped."""
    for name, shipped in RECIPES.items():
        told = (ROOT / "recipes" / f"{shipped}.yaml").read_text()
        path = folder / f"{shipped}-{at}.yaml"
        path.write_text(told.replace("at: 4096", f"at: {at}"))
        yield name, str(path)
    for name, plan in PLANS.items():
        path = folder / f"{name}.yaml"
        path.write_text(plan + "\n")
        yield name, str(path)
    yield "share", "shared-balanced"
    wanted = {budget: folder / f"kvzip-{budget}.yaml" for budget in BUDGETS}
    if not all(path.exists() for path in wanted.values()):
        begun = time.process_time()
        scores = kvzip_scores(base)
        print(f"kvzip's scores: {time.process_time() - begun:.0f} s of processor time", flush=True)
        for budget, path in wanted.items():
            path.write_text(kvzip_plan(scores, budget / 100, at))
    for budget, path in wanted.items():
        yield f"kvzip:{budget}", str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--at", type=int, default=2048)
    parser.add_argument("--only", type=lambda text: text.split(","), help="names of rows, or how they begin")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    models = {}
    for name, recipe in recipes(options.base, options.folder, options.at):
        if options.only and not any(name.startswith(wanted) for wanted in options.only):
            continue
        output = options.folder / name.replace(":", "-")
        if not output.exists():
            command = ["convert", options.base, "--recipe", recipe, "-o", output, "--no-validate", "--device", "cpu"]
            wall, spent = run(*command)
            print(f"{name}: {wall:.0f} s, {spent:.0f} of processor time", flush=True)
        models[name] = output
    (options.folder / "models.txt").write_text(" ".join(f"{name}={path}" for name, path in models.items()) + "\n")
    print("\n".join(f"{name}={path}" for name, path in models.items()))


if __name__ == "__main__":
    main()
