"""Is every treatment right and fast on an accelerator? Random Llama-shaped models; no weights are fetched.

    python docs/benchmarks/device.py DIR --device cuda
    python docs/benchmarks/device.py DIR --device cpu --small       # tries the script itself, in two minutes

1. Correctness. A small model is converted by a plan for each treatment, and by one with all of them. Each result runs
   in bfloat16 with every attention kernel, and in float32 with eager attention. The difference of their logits is
   compared with that of the base model, which rounds as well: no more than twice as much is right. Then 64 tokens are
   read one by one with a cache, and compared with one pass.
2. Speed. A model of 1.1 billion parameters (as Llama 3.2 1B, but 32,000 tokens) is converted so that half of its KV
   groups have windows of 256 tokens, and `sa-convert bench` times it against its base. Beside the ratios stand those
   of the bytes that a step reads and of the arithmetic of a prefill.

Results are printed, and written to DIR/device.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
KERNELS = ("eager", "sdpa", "flex_attention")
WINDOW = "{window: {sinks: 4, tokens: 48}}"
TREATMENTS = {
    "share": "  4: {0: {share: [[3, 1], [3, 0]]}, 2: {share: [[1, 4], [1, 5]]}}\n  5: {1: {share: [[3, 1], [3, 0]]}}",
    "window": f"  0: {{1: {WINDOW}, 2: {WINDOW}}}\n  2: {{0: {WINDOW}, 1: {WINDOW}, 2: {WINDOW}, 3: {WINDOW}}}",
    "drop": "  6: drop",
}
"""Layers of a plan for each treatment. No two of them touch one layer, so all of them together are a plan, too."""

SMALL = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}


def make(folder: Path, layers: int, sizes: dict, vocabulary: int) -> None:
    """A random Llama in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **sizes, head_dim=64, num_hidden_layers=layers, vocab_size=vocabulary, max_position_embeddings=16384,
        tie_word_embeddings=True, initializer_range=0.05, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)


def run(*command: object) -> str:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-m", "sa_convert", *map(str, command)], env=environment, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(f"sa-convert {command[0]} ended with {done.returncode}")
    return done.stdout


def convert(base: Path, plan: str, output: Path) -> Path:
    recipe = output.with_suffix(".yaml")
    recipe.write_text(f"plan:\n{plan}\n")
    run("convert", base, "--recipe", recipe, "-o", output, "--no-validate")
    return output


def logits(folder: Path, tokens, dtype, kernel: str, device: str):
    """(B, T, vocabulary) in float32: in one pass, and of the last tokens read one by one."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=kernel, trust_remote_code=True
    ).to(device)
    with torch.inference_mode():
        whole = model(tokens).logits.float()
        steps, cache = STEPS, DynamicCache()
        parts = [model(tokens[:, :-steps], past_key_values=cache).logits]
        for at in range(tokens.shape[1] - steps, tokens.shape[1]):
            parts.append(model(tokens[:, at : at + 1], past_key_values=cache).logits)
    return whole, torch.cat(parts, dim=1).float()


STEPS = 64


def correctness(folder: Path, device: str, kernels: tuple[str, ...]) -> list[dict]:
    """One row for each plan and kernel."""
    import torch

    base = folder / "small"
    make(base, 8, SMALL, 2000)
    subjects = {"base": base}
    plans = {**TREATMENTS, "all": "\n".join(TREATMENTS.values())}
    for name, plan in plans.items():
        subjects[name] = convert(base, plan, folder / f"small-{name}")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2000, (2, 320), generator=generator).to(device)
    rows = []
    for name, subject in subjects.items():
        exact, _ = logits(subject, tokens, torch.float32, "eager", device)
        scale = exact.std().item()
        for kernel in kernels:
            whole, cached = logits(subject, tokens, torch.bfloat16, kernel, device)
            rows.append(
                {
                    "plan": name,
                    "kernel": kernel,
                    "error": (whole - exact).abs().mean().item() / scale,
                    "cached": (cached - exact).abs().mean().item() / scale,
                }
            )
    allowed = {row["kernel"]: 2 * row["error"] for row in rows if row["plan"] == "base"}
    for row in rows:
        row["right"] = max(row["error"], row["cached"]) <= allowed[row["kernel"]]
    return rows


def speed(folder: Path, device: str, small: bool) -> list[dict]:
    """One row for each batch and context."""
    base, layers = folder / "large", 4 if small else 16
    make(base, layers, SMALL if small else LARGE, 2000 if small else 32000)
    groups = (SMALL if small else LARGE)["num_key_value_heads"]
    window = "{window: {sinks: 4, tokens: 256}}"
    plan = "\n".join(
        f"  {layer}: {{{', '.join(f'{group}: {window}' for group in range(groups // 2))}}}" for layer in range(layers)
    )
    converted = convert(base, plan, folder / "large-window")
    cases = [(1, 512), (2, 1024)] if small else [(1, 4096), (8, 8192), (32, 4096)]
    rows = []
    for batch, context in cases:
        options = ["--contexts", context, "--batches", batch, "--new-tokens", 16, "--repeats", 3, "--device", device]
        found = json.loads(run("bench", converted, "--against", base, *options, "--json"))
        rows.append({"batch": batch, "context": context, "bench": found})
        print(f"batch {batch}, context {context}: {json.dumps(found)}", flush=True)  # a lent machine may be taken back
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="where the models are made")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", choices=("correctness", "speed"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    found: dict = {}
    if options.only != "speed":
        start = time.perf_counter()
        kernels = KERNELS if options.device != "cpu" else KERNELS[:2]
        found["correctness"] = correctness(options.folder, options.device, kernels)
        print("| plan | kernel | error of logits, bfloat16 | cached | right |\n|---|---|---|---|---|")
        for row in found["correctness"]:
            right = "yes" if row["right"] else "NO"
            print(f"| {row['plan']} | {row['kernel']} | {row['error']:.4f} | {row['cached']:.4f} | {right} |")
        print(f"\n{time.perf_counter() - start:.0f} s\n", flush=True)
    if options.only != "correctness":
        found["speed"] = speed(options.folder, options.device, options.small)
    (options.folder / "device.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
