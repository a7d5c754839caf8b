"""What becomes of perplexity if a full cache makes room instead of being computed again.

    python docs/benchmarks/overflow.py MODEL [--length 1024] [--gone 512] [--texts 8]

Of each text, LENGTH tokens are read. Then GONE of them go, those after the first 4, and the next 256 tokens are scored:

    turned       the cache makes room: what stays is turned to its new positions (`make_room`)
    recomputed   the shorter text is read anew
    everything   nothing went; the model has positions for it
    not turned   what stays keeps the positions at which it was read, and the new tokens count from the shorter text

Perplexities are over all texts; the difference to `recomputed` is the mean over texts of that in nats, with its
standard error.
"""

import argparse
import copy
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from sa_convert.domain.model import RunOptions
from sa_convert.models.arguments import cache_keyword, dynamic_cache
from sa_convert.models.placement import placed
from sa_convert.models.subject import open_subject
from sa_convert.models.tokens import long_sequences
from sa_convert.plan.audited import foreign_code
from sa_convert.sessions import overflow
from sa_convert.texts.text import load_text

SCORED = 256
KINDS = ("prose", "code")
WAYS = ("turned", "recomputed", "everything", "not turned")


@torch.inference_mode()
def filled(model, ids):
    cache = dynamic_cache(model)
    for start in range(0, ids.shape[1], 512):
        model(ids[:, start : start + 512], **{cache_keyword(model): cache}, use_cache=True, logits_to_keep=1)
    return cache


@torch.inference_mode()
def loss(model, cache, last, ids):
    """Mean loss of ids (1, SCORED) after what is cached and the token `last` (1, 1), in nats."""
    given = torch.cat([last, ids[:, :-1]], dim=1)
    logits = model(given, **{cache_keyword(model): cache}, use_cache=True).logits
    return torch.nn.functional.cross_entropy(logits[0].float(), ids[0]).item()


class Still:
    """In place of a rotation: keys keep the positions at which they were read."""

    def back(self, layer, keys, tokens):
        return keys


def losses(model, text, length, gone):
    """text: (1, length + 1 + SCORED)"""
    read, last, ids = text[:, :length], text[:, length : length + 1], text[:, length + 1 :]
    cache = filled(model, read)
    everything = copy.deepcopy(cache)
    still = copy.deepcopy(cache)
    first = overflow.make_room(cache, model, gone)
    overflow.make_room(still, model, gone, rotation=Still())
    shorter = torch.cat([read[:, :first], read[:, first + gone :]], dim=1)
    caches = (cache, filled(model, shorter), everything, still)
    return [loss(model, each, last, ids) for each in caches]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--gone", type=int, default=512)
    parser.add_argument("--texts", type=int, default=8)
    told = parser.parse_args()
    run = RunOptions(device="cpu", dtype="float32")
    with TemporaryDirectory() as temporary:
        subject = open_subject(told.model, Path(temporary) / "model", run, foreign_code)
        text = load_text("builtin").split("validation", KINDS)
        texts = long_sequences(subject.tokenizer(), text, told.texts, told.length + 1 + SCORED)
        with subject.load(placed(subject.folder, run)) as loaded:
            found = []
            for row in texts:
                found.append(losses(loaded.model, row[None], told.length, told.gone))
                print("  ".join(f"{name} {value:.4f}" for name, value in zip(WAYS, found[-1], strict=True)), flush=True)
    table = torch.tensor(found, dtype=torch.float64)
    print(
        f"\n{subject.name}: {told.length} tokens read, {told.gone} go, {len(table)} texts, {SCORED} tokens scored of "
        "each\n"
    )
    print("| | perplexity | against recomputed, nats | perplexity, against recomputed |\n|---|---|---|---|")
    for place, name in enumerate(WAYS):
        apart = table[:, place] - table[:, 1]
        error = apart.std().item() / math.sqrt(len(apart))
        shown = f"{apart.mean():+.4f} ± {error:.4f}" if name != "recomputed" else ""
        relative = f"{math.expm1(apart.mean().item()):+.2%}" if name != "recomputed" else ""
        print(f"| {name} | {math.exp(table[:, place].mean().item()):.3f} | {shown} | {relative} |")


if __name__ == "__main__":
    main()
