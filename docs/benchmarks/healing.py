"""What healing gives on text of domains that nobody trained on, and on copying by distance: the tables of healing.md.

    python docs/benchmarks/healing.py BASE DIR [DIR ...] [--length 512] [--sequences 12] [--probes 8]

BASE: the base model's folder. DIR: converted folders, healed or not. Printed is a line of a table for each: the rise of
perplexity on news and encyclopaedia articles (docs/benchmarks/quality_text.py, or long.py if the length is not 512)
with one standard error of the paired difference, and the rise of the loss of copying in nats at each distance up to
half of the length. If a folder was healed, the line names tokens and seconds of that.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from quality_text import LENGTH, OUT_OF_DOMAIN, default_cache, domains

SHORTEST = 32
SEED = 4_242
"""Not that of the judge."""


def probes_and_texts(options: argparse.Namespace, tokenizer: Any, model: Any) -> tuple[dict[str, Any], dict[int, Any]]:
    """Tokens (sequences, length) by domain, and probes (probes, 2 x distance) by distance."""
    from sa_convert.measure.quality.copying import copying_probes
    from sa_convert.models.load import embedded_tokens
    from sa_convert.models.tokens import ordinary_tokens

    if options.length == LENGTH:
        found = domains(tokenizer, default_cache())
    else:
        from long import texts

        found = texts(tokenizer, default_cache(), options.length, options.sequences)
    vocabulary, distances = ordinary_tokens(tokenizer, embedded_tokens(model)), [SHORTEST]
    while 4 * distances[-1] <= options.length:
        distances.append(2 * distances[-1])
    probes = {
        distance: copying_probes(vocabulary, period=distance, length=2 * distance, probes=options.probes, seed=SEED)
        for distance in distances
    }
    return {name: rows[: options.sequences] for name, rows in found.items() if name in OUT_OF_DOMAIN}, probes


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


def rises(base: dict[str, list[float]], found: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
    """Of the loss, in nats, with one standard error of the paired difference: "text", and of copying each distance."""
    pairs = {kind: list(zip(losses, found[kind], strict=True)) for kind, losses in base.items()}
    text = [pair for kind, some in pairs.items() if kind in OUT_OF_DOMAIN for pair in some]
    kinds = {"text": text} | {kind: some for kind, some in pairs.items() if kind not in OUT_OF_DOMAIN}
    rise = {kind: [after - before for before, after in some] for kind, some in kinds.items()}
    return {kind: (fmean(one), stdev(one) / math.sqrt(len(one))) for kind, one in rise.items()}


def line(folder: Path, base: dict[str, list[float]], found: dict[str, list[float]]) -> str:
    """One row of the table."""
    told = rises(base, found)
    mean, error = told.pop("text")
    cells = [f"{math.expm1(mean):+.1%} ± {100 * error * math.exp(mean):.1f}"]
    cells += [f"{mean:+.3f} ± {error:.3f}" for mean, error in told.values()]
    report = json.loads((folder / "report.json").read_text()) if (folder / "report.json").is_file() else {}
    heal = report.get("heal")
    spent = f"{heal['kept_tokens']:,} tokens" if heal else "not healed"
    return f"| {folder.name} | {spent} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a sequence")
    parser.add_argument("--sequences", type=int, default=12, help="of each domain, at most 24")
    parser.add_argument("--probes", type=int, default=8, help="of each distance")
    options = parser.parse_args()
    from sa_convert.models.load import load_base, load_converted, load_tokenizer
    from sa_convert.models.placement import place
    from sa_convert.models.products import fast_products

    tokenizer = load_tokenizer(options.base, otherwise="")
    placement = place(options.base)
    with fast_products(), load_base(options.base, placement) as loaded:
        texts, probes = probes_and_texts(options, tokenizer, loaded.model)
        base = measured(loaded.model, texts, probes)
    distances = [kind for kind in base if kind not in OUT_OF_DOMAIN]
    print("| | healed on | perplexity, other domains | " + " | ".join(distances) + " |")
    print("|---" * (3 + len(distances)) + "|")
    for folder in options.folders:
        with fast_products(), load_converted(folder, placement, None) as loaded:
            print(line(folder, base, measured(loaded.model, texts, probes)), flush=True)


if __name__ == "__main__":
    main()
