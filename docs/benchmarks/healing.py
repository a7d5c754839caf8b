"""What healing gives on text of domains that nobody trained on, and on copying by distance: the tables of healing.md.

    python docs/benchmarks/healing.py BASE DIR [DIR ...] [--sequences 12]

BASE: the base model's folder. DIR: converted folders, healed or not. Printed is a line of a table for each: the rise of
perplexity on news and encyclopaedia articles (docs/benchmarks/quality_text.py) with one standard error of the paired
difference, and the rise of the loss of copying in nats at each distance. If a folder was healed, the line names tokens
and seconds of that.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from quality_text import OUT_OF_DOMAIN, default_cache, domains

DISTANCES = (32, 64, 128, 256)
PROBES = 8
SEED = 4_242
"""Not that of the judge."""


def measured(model: Any, texts: dict[str, Any], probes: dict[int, Any]) -> dict[str, list[float]]:
    """Mean loss of each sequence of text and of each probe."""
    import torch
    from torch.nn import functional

    def losses(rows: Any, begin: int) -> list[float]:
        found = []
        for row in rows:
            with torch.inference_mode():
                logits = model(input_ids=row[None].to(model.device), use_cache=False).logits[0, begin - 1 : -1].float()
            found.append(functional.cross_entropy(logits, row[begin:].to(logits.device)).item())
        return found

    found = {name: losses(rows, 1) for name, rows in texts.items()}
    return found | {f"copying {distance}": losses(rows, distance) for distance, rows in probes.items()}


def line(folder: Path, base: dict[str, list[float]], found: dict[str, list[float]]) -> str:
    """One row of the table."""
    rises = [after - before for name in OUT_OF_DOMAIN for before, after in zip(base[name], found[name], strict=True)]
    mean = sum(rises) / len(rises)
    error = math.sqrt(sum((rise - mean) ** 2 for rise in rises) / (len(rises) - 1) / len(rises))
    cells = [f"{math.exp(mean) - 1:+.1%} ± {100 * error * math.exp(mean):.1f}"]
    for distance in DISTANCES:
        pairs = zip(base[f"copying {distance}"], found[f"copying {distance}"], strict=True)
        rises = [after - before for before, after in pairs]
        cells.append(f"{sum(rises) / len(rises):+.3f}")
    report = json.loads((folder / "report.json").read_text()) if (folder / "report.json").is_file() else {}
    heal = report.get("heal")
    spent = f"{heal['tokens']:,} tokens, {heal['seconds']:.0f} s" if heal else "not healed"
    return f"| {folder.name} | {spent} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--sequences", type=int, default=12, help="of each domain, at most 24")
    options = parser.parse_args()
    from sa_convert.measure.quality.copying import copying_probes
    from sa_convert.models.load import embedded_tokens, load_base, load_converted, load_tokenizer
    from sa_convert.models.placement import place
    from sa_convert.models.tokens import ordinary_tokens

    tokenizer = load_tokenizer(options.base, otherwise="")
    texts = {
        name: rows[: options.sequences]
        for name, rows in domains(tokenizer, default_cache()).items()
        if name in OUT_OF_DOMAIN
    }
    placement = place(options.base)
    with load_base(options.base, placement) as loaded:
        vocabulary = ordinary_tokens(tokenizer, embedded_tokens(loaded.model))
        probes = {
            distance: copying_probes(vocabulary, period=distance, length=2 * distance, probes=PROBES, seed=SEED)
            for distance in DISTANCES
        }
        base = measured(loaded.model, texts, probes)
    print("| | healed on | perplexity, other domains | " + " | ".join(f"copying {d}" for d in DISTANCES) + " |")
    print("|---" * (3 + len(DISTANCES)) + "|")
    for folder in options.folders:
        with load_converted(folder, placement, None) as loaded:
            print(line(folder, base, measured(loaded.model, texts, probes)), flush=True)


if __name__ == "__main__":
    main()
