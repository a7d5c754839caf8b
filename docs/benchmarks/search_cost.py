"""Memory and time of a search by the whole cache: a formula, and what passes over sequences really take.

    python docs/benchmarks/search_cost.py estimate
    python docs/benchmarks/search_cost.py measure ./model --long 1024 --short 256
    python docs/benchmarks/search_cost.py measure 8,1024,16,4,2816,32000 --long 1024 --short 256

`estimate` prints the table for large models. `measure` runs passes of a Llama, of a folder or a random one (layers,
hidden size, query heads, KV groups, MLP size, vocabulary) in float32, on one thread.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONG, SHORT, KEPT = 2048, 512, 768
"""Tokens of long and of short sequences, and predictions of a long one that count."""

LOGITS = 5
"""Copies of the logits in float32 at once: themselves, log-probabilities, chances, and gradients of both."""


@dataclass(frozen=True)
class Size:
    """A Llama. Memory in bytes, work in floating point operations."""

    layers: int
    hidden: int
    heads: int
    groups: int
    mlp: int
    vocabulary: int
    tied: bool = False

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    @property
    def block(self) -> int:
        """Parameters of a layer, norms left out."""
        return self.hidden * (2 * self.hidden + 2 * self.groups * self.head + 3 * self.mlp)

    @property
    def parameters(self) -> int:
        return self.layers * self.block + (1 if self.tied else 2) * self.vocabulary * self.hidden

    def saved(self, tokens: int, element: int) -> int:
        """What one layer keeps for the way back, without probabilities: the inputs of its norms; queries, keys, values
        and outputs of heads, the latter once more in one piece, with their gradients; three vectors of the MLP."""
        heads, keys = self.heads * self.head, self.groups * self.head
        return tokens * element * (2 * self.hidden + 4 * heads + 2 * keys + 3 * self.mlp)

    def long_pass(self, tokens: int, element: int, layers: int | None = None) -> int:
        """Beside the weights. layers: whose activations are kept at a time; None: all."""
        count = self.layers if layers is None else layers
        return count * self.saved(tokens, element) + LOGITS * 4 * min(KEPT, tokens) * self.vocabulary

    def short_pass(self, tokens: int, element: int) -> int:
        """Likewise, with sharing on offer: the probabilities of all heads are kept for the way back, and all are put
        together for the costs, with products of every pair of heads of the last layer."""
        pairs = self.layers * self.heads * tokens**2
        kept = 4 if element == 4 else 4 + element  # the softmax is in float32
        costs = 3 * 4 * tokens * self.layers * self.heads * self.heads
        return (
            self.layers * self.saved(tokens, element)
            + pairs * (kept + 4)
            + LOGITS * 4 * tokens * self.vocabulary
            + costs
        )

    def forward(self, tokens: int, kept: int) -> int:
        """Operations of a pass. Back through frozen weights it takes as many."""
        attention = 4 * self.layers * self.hidden * tokens**2
        return 2 * self.layers * self.block * tokens + attention + 2 * kept * self.vocabulary * self.hidden


MODELS = {
    "8B": Size(32, 4096, 32, 8, 14336, 128256),
    "70B": Size(80, 8192, 64, 8, 28672, 128256),
}


@dataclass(frozen=True)
class Passes:
    """Of a search for one budget. long, short: there and back. judged: there only, over the held-out long sequences.
    singly: KV groups one by one, half a pass each on average, since layers before them are not run."""

    long: int = 10
    short: int = 9
    judged: int = 5 * (1 + 2 + 2)
    singly: int = 21

    def work(self, size: Size) -> float:
        there = size.forward(LONG, KEPT)
        return (
            2 * self.long * there
            + 2 * self.short * size.forward(SHORT, SHORT)
            + (self.judged + self.singly / 2) * there
        )

    @property
    def readings(self) -> float:
        """How often all weights are read if they do not fit: once on the way there. There is no way back then."""
        return self.long + self.short + self.judged + self.singly / 2


def table() -> Iterator[str]:
    yield "| | " + " | ".join(MODELS) + " |\n|---|---|---|"
    sizes, passes = MODELS.values(), Passes()

    def row(name: str, value: Callable[[Size], str]) -> str:
        return f"| {name} | " + " | ".join(value(size) for size in sizes) + " |"

    yield row("parameters", lambda size: f"{size.parameters / 1e9:.1f} billion")
    yield row("weights in bfloat16", lambda size: told(2 * size.parameters))
    yield row("weights of one layer", lambda size: told(2 * size.block))
    yield row("a long pass, beside the weights", lambda size: told(size.long_pass(LONG, 2)))
    yield row("a short pass with sharing, likewise", lambda size: told(size.short_pass(SHORT, 2)))
    yield row("a long pass, layer by layer", lambda size: told(size.long_pass(LONG, 2, 1)))
    yield row("predictions of the base, in the memory of the CPU", lambda size: told(5 * KEPT * size.vocabulary * 2))
    yield row("work", lambda size: f"{passes.work(size):.2g} operations")
    yield row("weights read, layer by layer", lambda size: told(passes.readings * 2 * size.parameters))


def told(amount: float) -> str:
    return f"{amount / 1e9:.1f} GB" if amount < 1e12 else f"{amount / 1e12:.1f} TB"


def model_of(asked: str) -> tuple[Any, Size]:
    """The model, random or of a folder."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if Path(asked).is_dir():
        model = AutoModelForCausalLM.from_pretrained(asked, dtype=torch.float32)
    else:
        layers, hidden, heads, groups, mlp, vocabulary = map(int, asked.split(","))
        config = LlamaConfig(
            num_hidden_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            intermediate_size=mlp,
            vocab_size=vocabulary,
            max_position_embeddings=8192,
        )
        model = LlamaForCausalLM(config)
    told = model.config
    size = Size(
        told.num_hidden_layers,
        told.hidden_size,
        told.num_attention_heads,
        told.num_key_value_heads,
        told.intermediate_size,
        told.vocab_size,
        bool(told.tie_word_embeddings),
    )
    return model.eval(), size


@dataclass
class Meter:
    """Peak memory and processor time of what runs between `begin` and `end`."""

    before: int = 0
    seconds: float = 0.0

    def begin(self) -> None:
        import ctypes
        import gc

        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what earlier passes have left
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self.before, self.seconds = _memory("VmRSS"), time.process_time()

    def end(self, name: str, expected: float, work: float) -> None:
        seconds, peak = time.process_time() - self.seconds, _memory("VmHWM") - self.before
        memory = f"{peak / 1e9:.2f} GB | {expected / 1e9:.2f} GB"
        print(f"| {name} | {memory} | {seconds:.1f} s | {work / seconds / 1e9:.0f} |", flush=True)


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def measure(asked: str, long: int, short: int) -> None:
    import torch

    from sa_convert.domain.geometry import LayerGeometry, ModelGeometry
    from sa_convert.domain.plan import Plan
    from sa_convert.domain.units import Units
    from sa_convert.families.table import FAMILIES
    from sa_convert.models.task import NEXT_TOKEN
    from sa_convert.observe.long_sequences import thinned
    from sa_convert.observe.probe import Probe
    from sa_convert.observe.sequences import REPETITION, Sample
    from sa_convert.observe.tried import Reference
    from sa_convert.search.scoring import collect
    from sa_convert.treatments.registry import searched

    torch.set_num_threads(1)
    model, size = model_of(asked)
    units = Units(ModelGeometry((LayerGeometry(size.heads, size.groups, size.head),) * size.layers))
    probe = Probe(model, FAMILIES["llama"])
    once = torch.randint(3, size.vocabulary, (round(0.6 * long),), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([once, once])[:long]
    repeated = Sample(tokens, REPETITION, thinned(torch.arange(long) >= 0), kept=True, period=len(once))
    text = Sample(tokens[:short], "text", NEXT_TOKEN.scored(tokens[None, :short])[0])
    print("| pass | peak memory | formula | processor time | billion operations a second |\n|---|---|---|---|---|")
    meter, kept, there = Meter(), min(KEPT, long), size.forward(long, min(KEPT, long))
    meter.begin()
    collect(probe, units, [], Plan(), searched(["window"]), long=[repeated, repeated])
    meter.end(f"2 long ones ({long}), windows", size.long_pass(long, 4), 4 * there)
    meter.begin()
    collect(probe, units, [text], Plan(), searched(["share"]), screened=1)
    meter.end(f"2 short ones ({short}), sharing", size.short_pass(short, 4), 4 * size.forward(short, short))
    meter.begin()
    Reference(probe, [repeated])
    meter.end(f"1 judged ({long})", 4 * 4 * kept * size.vocabulary, there)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["estimate", "measure"])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--long", type=int, default=1024)
    parser.add_argument("--short", type=int, default=256)
    asked = parser.parse_args()
    if asked.what == "estimate":
        print("\n".join(table()))
    else:
        measure(asked.model, asked.long, asked.short)


if __name__ == "__main__":
    main()
