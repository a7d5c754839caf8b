"""Whether it pays to read a session's file ahead of the layers that need it.

    python docs/benchmarks/session_ahead.py MODEL [--tokens 4096] [--new 128] [--runs 5]

A cache of random numbers, as large as that of so many tokens, is written. Then, in turns, it is loaded with and without
a thread that reads ahead, and the model reads a message. The file is asked out of the system's memory each time, or
left there. Medians, and quartiles, of the seconds until the message is read.
"""

import argparse
import time
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory

import torch

from sa_convert.domain.model import RunOptions
from sa_convert.measure.speed.conversation_timer import forget
from sa_convert.models.arguments import cache_keyword, dynamic_cache, last_logits_only
from sa_convert.models.placement import placed
from sa_convert.models.subject import open_subject
from sa_convert.plan.audited import foreign_code
from sa_convert.sessions.loading import load
from sa_convert.sessions.saving import save


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    told = parser.parse_args()
    run = RunOptions(device="cpu", dtype="float32")
    with TemporaryDirectory() as temporary:
        file = Path(temporary) / "session"
        subject = open_subject(told.model, Path(temporary) / "model", run, foreign_code)
        with subject.load(placed(subject.folder, run)) as loaded, torch.inference_mode():
            model = loaded.model
            shape = (1, model.config.num_key_value_heads, told.tokens, model.config.head_dim)
            cache = dynamic_cache(model)
            for layer in range(model.config.num_hidden_layers):
                cache.update(torch.randn(shape), torch.randn(shape), layer)
            size = save(cache, torch.zeros(1, told.tokens), file, model)
            new, seconds = torch.randint(1000, (1, told.new)), {}
            for _ in range(told.runs):
                for cold in (True, False):
                    for ahead in (True, False):
                        if cold:
                            forget(file)
                        began = time.perf_counter()
                        kept = load(file, model, ahead=ahead).cache
                        model(new, use_cache=True, **{cache_keyword(model): kept}, **last_logits_only(model))
                        seconds.setdefault((cold, ahead), []).append(time.perf_counter() - began)
    print(f"{subject.name}: {size / 1e6:.1f} MB, {told.new} new tokens\n")
    print("| file | read ahead | median | quartiles |\n|---|---|---|---|")
    for (cold, ahead), runs in seconds.items():
        first, middle, third = quantiles(runs, n=4, method="inclusive")
        where, how = "on the disk" if cold else "in memory", "yes" if ahead else "no"
        print(f"| {where} | {how} | {middle:.2f} s | {first:.2f} - {third:.2f} s |")


if __name__ == "__main__":
    main()
