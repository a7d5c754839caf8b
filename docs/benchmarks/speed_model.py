"""Makes the models that speed is measured on: a base, the same with sharing, and, if asked, with windows.

    python docs/benchmarks/speed_model.py DIR [--window 512]
    sa-convert bench DIR/shared --against DIR/base --contexts 512,2048,4096 --batches 4
    sa-convert bench DIR/windows --against DIR/base --contexts 512,2048,4096 --batches 4

DIR/base is Llama-shaped: 16 layers, hidden size 1024, 16 heads of 64 (as many key/value heads), feed-forward size 2816,
32,000 tokens, 8192 positions, random weights in float32: 271 million parameters, 1.1 GB. DIR/shared is made of it by
`sa-convert convert --no-validate`: two spans of four layers borrow from the layer before them, layers 4-7
that of layer 3 and layers 11-14 that of layer 10, so 8 of 16 layers cache no keys. With `--window TOKENS` there is
DIR/windows too: half of the KV groups of every layer see 4 sinks and so many tokens, groups drawn by chance, as a
search leaves them scattered. What is there already stays as it is, so windows can be added to a pair made before.
`--hidden`, `--layers` and `--vocabulary` make smaller ones, to try things out. Weights are random: the speed does not
depend on them.
"""

import argparse
import os
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAD, REUSING, SINKS = 64, 4, 4

RECIPE = """description: Two spans of four layers
sharing:
  spans:
    - {{layers: {first}-{first_end}, source: {first_source}}}
    - {{layers: {second}-{second_end}, source: {second_source}}}
"""


def build(folder: Path, hidden: int, layers: int, vocabulary: int) -> None:
    """Write the base."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden, num_attention_heads=hidden // HEAD, num_key_value_heads=hidden // HEAD, head_dim=HEAD,
        intermediate_size=hidden * 11 // 4, num_hidden_layers=layers, vocab_size=vocabulary,
        max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def sharing(layers: int) -> str:
    """The recipe of the one that shares."""
    first, second = layers // 4, layers * 11 // 16
    return RECIPE.format(
        first=first, first_end=first + REUSING - 1, first_source=first - 1,
        second=second, second_end=second + REUSING - 1, second_source=second - 1,
    )  # fmt: skip


def windows(layers: int, groups: int, tokens: int) -> str:
    """The recipe of the one with windows on half of the KV groups of every layer."""
    chance, lines = random.Random(0), [f"description: Windows of {tokens} tokens on half of the KV groups", "plan:"]
    for layer in range(layers):
        chosen = sorted(chance.sample(range(groups), groups // 2))
        told = ", ".join(f"{group}: {{window: {{sinks: {SINKS}, tokens: {tokens}}}}}" for group in chosen)
        lines.append(f"  {layer}: {{{told}}}")
    return "\n".join(lines) + "\n"


def convert(base: Path, recipe: Path, output: Path, text: str) -> None:
    """Write a conversion. recipe: the file that `text` is put in."""
    recipe.write_text(text)
    command = [sys.executable, "-m", "sa_convert", "convert", base, "--recipe", recipe, "-o", output, "--no-validate"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    subprocess.run([*map(str, command)], check=True, env={**os.environ, "PYTHONPATH": path})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="where models and their recipes are made")
    parser.add_argument("--window", type=int, metavar="TOKENS", help="make DIR/windows too")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=32000)
    options = parser.parse_args()
    if options.hidden % (2 * HEAD) or options.layers < 16:
        parser.error(f"--hidden must be a multiple of {2 * HEAD}, and --layers at least 16")
    folder, groups = options.folder, options.hidden // HEAD
    if (folder / "windows" if options.window else folder / "base").exists():
        parser.error(f"{folder / ('windows' if options.window else 'base')} exists already")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").exists():
        build(folder / "base", options.hidden, options.layers, options.vocabulary)
    if not (folder / "shared").exists():
        convert(folder / "base", folder / "recipe.yaml", folder / "shared", sharing(options.layers))
    if options.window:
        text = windows(options.layers, groups, options.window)
        convert(folder / "base", folder / "windows.yaml", folder / "windows", text)


if __name__ == "__main__":
    main()
