"""What fewer KV groups in a layer cost beside a layer without attention: the two that Nemotron-NAS's class knows.

    python docs/benchmarks/fewer_groups.py MODEL [--sequences 12] [--probes 8] [--layers 2,4,6]

MODEL: a folder with a Llama. In a layer of one KV group all query heads read the same keys and values. The best such
layer that needs no training, by calibration text:

- Keys. Under rotary positions a KV group may be turned and scaled pair by pair, by a complex number each, and queries
  take that back. So the keys of all KV groups of a pair become multiples of one: the leading eigenvector of their
  second moments (KV groups x KV groups, complex), weighted by the squares of their queries.
- Values. All values of a layer become `head_dim` numbers, in the basis that is best for what the output projection
  makes of them. It reads them by a matrix for each head, so this is as general as it gets.

Both are written into the weights as projections, which computes what the smaller layer would. Every layer is measured
by itself, with one KV group and with none. Then the layers that cost least are treated together: for as many bytes of
cache, half more layers with one KV group of three than with none. Nothing of sa_convert's treatments is used.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from healing import measured, probes_and_texts, rises  # noqa: E402
from sa_convert.models.tokens import token_sequences  # noqa: E402
from sa_convert.texts.text import load_text  # noqa: E402

ROWS, LENGTH = 24, 512
"""Of calibration."""


def moments(model: Any, rows: torch.Tensor) -> list[torch.Tensor]:
    """Second moments (D, D) of what goes into the attention of each layer."""
    found = [torch.zeros(()) for _ in model.model.layers]

    def note(at: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            states = kwargs["hidden_states"].flatten(0, -2).double()
            found[at] = found[at] + states.T @ states

        return hook

    handles = [
        layer.self_attn.register_forward_pre_hook(note(at), with_kwargs=True)
        for at, layer in enumerate(model.model.layers)
    ]
    with torch.inference_mode():
        for row in rows:
            model(input_ids=row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return [one / rows.numel() for one in found]


def one_key(attention: Any, moment: torch.Tensor, size: int) -> torch.Tensor:
    """The weights of the key projection with which all KV groups have multiples of one key."""
    half = size // 2

    def pairs(weight: torch.Tensor) -> torch.Tensor:
        """(heads x size, D) -> complex (heads, pairs, D): the two numbers that are turned together."""
        first, second = weight.double().unflatten(0, (-1, 2, half)).unbind(1)
        return torch.complex(first, second)

    keys, queries = pairs(attention.k_proj.weight), pairs(attention.q_proj.weight)
    groups, among = len(keys), moment.to(torch.complex128)
    power = torch.einsum("hpd,de,hpe->hp", queries, among, queries.conj()).real
    weight = power.unflatten(0, (groups, -1)).mean(1).sqrt()[..., None]  # (groups, pairs, 1)
    weighted = weight * keys
    between = torch.einsum("gpd,de,hpe->pgh", weighted, among, weighted.conj())
    leading = torch.linalg.eigh(between)[1][..., -1]  # (pairs, groups)
    shared = torch.einsum("pg,gpd->pd", leading.conj(), weighted)
    found = torch.einsum("pg,pd->gpd", leading, shared) / weight
    return torch.stack([found.real, found.imag], 1).flatten(0, 2)


def one_value(attention: Any, moment: torch.Tensor, size: int) -> torch.Tensor:
    """The weights of the value projection with which all values of the layer lie in `size` dimensions."""
    values, outputs = attention.v_proj.weight.double(), attention.o_proj.weight.double()
    groups = len(values) // size
    reads = outputs.unflatten(1, (groups, -1, size))  # (D, groups, heads of one, size)
    squares = torch.einsum("dghv,dghw->gvw", reads, reads)
    metric = torch.block_diag(*squares)
    found, vectors = torch.linalg.eigh(metric)
    found = found.clamp(min=found.max() * 1e-9).sqrt()
    root, inverse = (vectors * found) @ vectors.T, (vectors / found) @ vectors.T
    first = torch.linalg.eigh(root @ values @ moment @ values.T @ root)[1][:, -size:]
    return inverse @ first @ first.T @ root @ values


class Treated:
    """The model with layers treated, and as it was afterwards. kind: "one", or "none" of the KV groups."""

    def __init__(
        self, model: Any, layers: list[int], kind: str, weights: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        self.changes = []
        for at in layers:
            attention = model.model.layers[at].self_attn
            if kind == "none":
                self.changes.append((attention.o_proj.weight, torch.zeros_like(attention.o_proj.weight)))
            else:
                self.changes += zip((attention.k_proj.weight, attention.v_proj.weight), weights[at], strict=True)

    def __enter__(self) -> None:
        self.kept = [weight.detach().clone() for weight, _ in self.changes]
        for weight, new in self.changes:
            weight.data.copy_(new)

    def __exit__(self, *_: object) -> None:
        for (weight, _), old in zip(self.changes, self.kept, strict=True):
            weight.data.copy_(old)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sequences", type=int, default=12, help="of each domain, in the second table")
    parser.add_argument("--probes", type=int, default=8, help="of each distance, in the second table")
    parser.add_argument("--layers", default="2,4,6", help="how many without attention, in the second table")
    options = parser.parse_args()
    options.length = LENGTH
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval().requires_grad_(False)
    size, groups = model.config.head_dim, model.config.num_key_value_heads
    pieces = token_sequences(tokenizer, load_text("builtin").split("calibration"), ROWS + ROWS // 4, LENGTH)
    chosen, held_out = pieces[:ROWS], pieces[ROWS:]
    weights = []
    for layer, moment in zip(model.model.layers, moments(model, chosen), strict=True):
        attention = layer.self_attn
        weights.append((one_key(attention, moment, size), one_value(attention, moment, size)))

    def losses() -> float:
        return sum(measured(model, {"text": held_out}, {})["text"]) / len(held_out)

    # 1. Layer by layer, on text beside that which the bases were made from.
    whole, cost = losses(), {"one": {}, "none": {}}  # type: float, dict[str, dict[int, float]]
    print(f"| layer | one KV group of {groups} | no attention |\n|---|---|---|")
    for at in range(len(weights)):
        for kind in cost:
            with Treated(model, [at], kind, weights):
                cost[kind][at] = losses() - whole
        print(f"| {at} | {cost['one'][at]:+.4f} | {cost['none'][at]:+.4f} |", flush=True)

    # 2. The cheapest together, on domains that nothing was chosen by.
    texts, probes = probes_and_texts(options, tokenizer, model)
    base = measured(model, texts, probes)
    names = [kind for kind in base if kind.startswith("copying")]
    print(f"\n| | cache saved | perplexity, other domains | {' | '.join(names)} |\n{'|---' * (3 + len(names))}|")
    for count in map(int, options.layers.split(",")):
        more = round(count * groups / (groups - 1))
        for kind, number in (("none", count), ("one", more)):
            order = sorted(cost[kind], key=cost[kind].__getitem__)[:number]
            with Treated(model, order, kind, weights):
                told = rises(base, measured(model, texts, probes))
            mean, error = told.pop("text")
            saved = number * (1 if kind == "none" else (groups - 1) / groups) / len(weights)
            shown = " | ".join(f"{one:+.3f} ± {spread:.3f}" for one, spread in told.values())
            what = f"{number} layers with {kind.replace('none', 'no')} KV group"
            print(f"| {what} | {saved:.1%} | {math.expm1(mean):+.1%} ± {100 * error * math.exp(mean):.1f} | {shown} |")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
