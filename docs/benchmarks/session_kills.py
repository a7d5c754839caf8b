"""Kills writers of a session at random times, and looks at what is there: the session before, or the new one, whole.

    PYTHONPATH=.:tests python docs/benchmarks/session_kills.py [--kills 100] [--seed 0]

Each writer is a fork of this process that saves a conversation of a tiny model with windows (some 8 MB) again and
again, with a number in its notes. It gets SIGKILL or SIGTERM within the time of a few saves. Then the file is loaded,
its cache is compared with that of the first one, number by number, and the number in its notes must be no smaller than
before. At the end one more save removes what was left.
"""

import argparse
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

torch.set_num_threads(1)


def written_by(cache, tokens, file, model, turn):
    """In a fork: save until somebody ends it."""
    from sa_convert.sessions.saving import save

    while True:
        turn += 1
        save(cache, tokens, file, model, notes={"turn": turn})


def states(cache):
    from sa_convert.measure.quality.cache_bytes import tensors_in

    return list(tensors_in([layer.__dict__ for layer in cache.layers]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args()
    from sa_convert.sessions.loading import load
    from sa_convert.sessions.saving import save
    from support.memory_models import some_ids
    from support.session_models import model_named, new_cache, read

    chance, found = random.Random(told.seed), Counter()
    model, ids = model_named("some windows"), some_ids(2000)
    cache = new_cache(model, "dynamic")
    read(model, cache, ids, [2000])
    with TemporaryDirectory() as folder:
        file, turn = Path(folder) / "session", 0
        size = save(cache, ids, file, model, notes={"turn": turn})
        began = time.monotonic()
        save(cache, ids, file, model, notes={"turn": turn})
        seconds = time.monotonic() - began
        wanted = states(load(file, model).cache)
        for _ in range(told.kills):
            child = os.fork()
            if not child:
                try:
                    written_by(cache, ids, file, model, turn)
                finally:
                    os._exit(1)
            time.sleep(chance.random() * 4 * seconds)
            number = chance.choice((signal.SIGKILL, signal.SIGTERM))
            os.kill(child, number)
            os.waitpid(child, 0)
            session = load(file, model)
            now = session.notes["turn"]
            assert now >= turn
            assert all(torch.equal(*pair) for pair in zip(states(session.cache), wanted, strict=True))
            parts = len(os.listdir(folder)) - 1
            assert parts <= 1, os.listdir(folder)  # the next writer removes what the one before has left
            left = "a part was left" if parts else "no part was left"
            found[f"{left}, the session is {'new' if now > turn else 'the one before'}"] += 1
            found[number.name] += 1
            turn = now
        save(cache, ids, file, model, notes={"turn": turn})
        assert os.listdir(folder) == ["session"]
    print(f"{told.kills} kills of writers of {size / 1e6:.1f} MB; never a broken session")
    for what, count in sorted(found.items()):
        print(f"{count:4}  {what}")


if __name__ == "__main__":
    main()
