"""Measures the memory of `sa-convert convert --layer-by-layer` with a search and a refit, against the model's size.

    python docs/benchmarks/memory.py [--gib 4] [--folder DIR] [--write]

Builds a random Llama in float32 of about this many GiB, with a small tokenizer, in a temporary folder of DIR. Then
converts it: a tenth of the key cache, refit, validation, all with one layer's weights in memory at a time; and reports
the peak memory of the process, as the kernel counts it. `--write` puts the result into memory.md
beside this file. Needs about 2.1 times the size on disk.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

HIDDEN, HEADS, GROUPS, INTERMEDIATE, VOCABULARY, POSITIONS = 2048, 16, 4, 5632, 32000, 128
LAYER_BYTES = 4 * (HIDDEN * HIDDEN * 2 + 2 * HIDDEN * HIDDEN * GROUPS // HEADS + 3 * HIDDEN * INTERMEDIATE)

RECIPE = {
    "sharing": {"search": {"key_cache": "10%"}},
    "refit": "ridge",
    "calibration": {"text": "builtin", "sequences": 6, "length": POSITIONS},
    "gate": {"max_perplexity_increase": "100%"},
}

RUN = """
import resource, subprocess, sys
status = subprocess.run([sys.executable, "-m", "sa_convert", *sys.argv[1:]], stdout=subprocess.PIPE).returncode
print(status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def build(folder: Path, gib: float) -> int:
    """Write the model layer by layer; returns its number of layers."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from support.tiny_models import save_tokenizer

    layers = round(gib * 1024**3 / LAYER_BYTES)
    config = LlamaConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=GROUPS, intermediate_size=INTERMEDIATE,
        vocab_size=VOCABULARY, num_hidden_layers=layers, max_position_embeddings=POSITIONS, tie_word_embeddings=True,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.float32
    config.save_pretrained(folder)
    save_tokenizer(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    weight_map, total = {}, 0
    torch.manual_seed(0)
    for number in range(-1, layers):
        mine = [name for name in shapes if (f".layers.{number}." in name if number >= 0 else ".layers." not in name)]
        tensors = {
            name: torch.ones(shapes[name]) if "norm" in name else torch.randn(shapes[name]) * HIDDEN**-0.5
            for name in mine
            if name != "lm_head.weight"
        }
        file = f"model-{number + 2:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return layers


def measure(base: Path, output: Path) -> int:
    """Peak memory of the converter in bytes."""
    recipe = base.parent / "recipe.json"
    recipe.write_text(json.dumps(RECIPE))
    arguments = ["convert", str(base), "--recipe", str(recipe), "-o", str(output), "--layer-by-layer"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, env=environment)
    status, peak = run.stdout.split()
    if status != "0":
        sys.exit(run.stderr[-2000:])
    return int(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        base = Path(folder) / "base"
        base.mkdir()
        layers = build(base, options.gib)
        size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
        peak = measure(base, Path(folder) / "out")
        report = json.loads((Path(folder) / "out" / "report.json").read_text())
    import torch
    import transformers

    gib = 1024**3
    text = f"""# Memory of a search and a refit, one layer at a time

Written by `python docs/benchmarks/memory.py --gib {options.gib:g} --write`. A random Llama in float32 is converted with
`--layer-by-layer`, by a recipe that searches 10% of the key cache, refits and validates.

| | |
|---|---|
| the model | {layers} layers, hidden size {HIDDEN}, {HEADS} query heads in {GROUPS} KV groups |
| calibration | {RECIPE["calibration"]["sequences"]} sequences of {POSITIONS} tokens |
| versions | torch {torch.__version__.partition("+")[0]}, transformers {transformers.__version__} |
| machine | {os.cpu_count()} cores |

| measured | |
|---|---|
| weights of the model | {size / gib:.2f} GiB |
| weights of one layer | {LAYER_BYTES / gib:.2f} GiB |
| peak memory of the converter | {peak / gib:.2f} GiB ({peak / size:.0%} of the weights) |
| key cache removed | {report["savings"]["key_cache_removed"]:.1%} |
"""
    print(text)
    if options.write:
        Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
