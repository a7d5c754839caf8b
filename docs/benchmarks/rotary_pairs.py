"""Keys in fewer numbers under rotary positions: two ways, tried on a Llama in memory, with nothing of sa_convert.

    python docs/benchmarks/rotary_pairs.py MODEL

*pairs*: a KV group keeps some of its rotary pairs. Queries and keys lose the others, so nothing has to be expanded. The
pairs that go are those whose loss costs least by the Fisher information, one after the other. *rank*: keys are
projected before they are turned, in the basis that is best by the Fisher information, as sa-convert does it. "Half":
the half of the KV groups that costs least. Rises in nats a token, with the standard error over 8 sequences of 512.
"""

import argparse
import inspect
import logging
import statistics
import sys
import tarfile
from pydoc_data import topics

import torch
import transformers.models.llama.modeling_llama as llama
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTH = 512


class Model:
    """The model, and what is done to its keys: kept (layers, groups, pairs) or (projections, means) by layer."""

    def __init__(self, folder):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        config = self.model.config
        self.layers, self.groups = config.num_hidden_layers, config.num_key_value_heads
        self.size = config.head_dim
        self.kept = self.projected = self.seen = None
        self.layer, self.turn = 0, llama.apply_rotary_pos_emb
        llama.apply_rotary_pos_emb = self.turned

    def turned(self, query, key, cos, sin, **options):
        layer, self.layer = self.layer, (self.layer + 1) % self.layers
        if self.projected is not None:
            projections, means = (found[layer][None] for found in self.projected)
            key = means[:, :, None] + torch.einsum("bgtd,bged->bgte", key - means[:, :, None], projections)
        if self.seen is not None:
            if layer == 0:
                query, key = query.detach().requires_grad_(True), key.detach().requires_grad_(True)
            before = key
        query, key = self.turn(query, key, cos, sin, **options)
        if self.seen is not None:
            self.seen.append((query, before))
        if self.kept is not None:
            key = key * self.kept[layer].repeat(1, 2)[None, :, None]
        return query, key

    @torch.no_grad()
    def losses(self, rows, start=0):
        found = []
        for row in rows:
            chances = torch.log_softmax(self.model(row).logits[0, :-1], dim=-1)
            found.append(-chances.gather(1, row[0, 1:, None])[start:].mean().item())
        return torch.tensor(found)

    def moments(self, rows):
        """Second moments: of what the loss of each pair does, of gradients at keys, of keys; and the mean of keys."""
        half = self.size // 2
        shape = (self.layers, self.groups)
        pairs, fisher = torch.zeros(*shape, half, half), torch.zeros(*shape, self.size, self.size)
        square, mean, count = torch.zeros_like(fisher), torch.zeros(*shape, self.size), 0
        for row in rows:
            self.seen = []
            with torch.enable_grad():
                chances = torch.log_softmax(self.model(row).logits[0], dim=-1)
                drawn = torch.multinomial(chances.detach().exp(), 1)
                loss = -chances.gather(1, drawn).sum()
                gradients = torch.autograd.grad(loss, [part for both in self.seen for part in both])
            for layer, (query, key) in enumerate(self.seen):
                at_query, at_key = (found[0] for found in gradients[2 * layer : 2 * layer + 2])
                # What a query's product with a pair of all keys' numbers does to the loss.
                moved = (query[0].detach() * at_query).unflatten(-1, (2, half)).sum(-2)
                moved = moved.unflatten(0, (self.groups, -1)).sum(1)
                pairs[layer] += torch.einsum("gta,gtb->gab", moved, moved)
                fisher[layer] += torch.einsum("gta,gtb->gab", at_key, at_key)
                keys = key[0].detach()
                square[layer] += torch.einsum("gta,gtb->gab", keys, keys)
                mean[layer] += keys.sum(1)
            count += LENGTH
        self.seen = None
        mean /= count
        return pairs / (2 * count), fisher / count, square / count - mean[..., None] * mean[..., None, :], mean


def pairs_to_keep(costs, count):
    """costs (pairs, pairs) -> what it costs to keep so many of them, and a mask of those."""
    gone, total = torch.zeros(len(costs)), 0.0
    while int(gone.sum()) < len(costs) - count:
        more = costs.diagonal() + 2 * costs @ gone
        more[gone.bool()] = torch.inf
        total += float(more.min())
        gone[int(more.argmin())] = 1
    return total, 1 - gone


def projection(fisher, covariance, rank):
    """What the best projection of a rank costs, and itself (D, D)."""
    values, vectors = torch.linalg.eigh(fisher.double())
    values = values.clamp(min=values.max() * 1e-9).sqrt()
    root, inverse = (vectors * values) @ vectors.T, (vectors / values) @ vectors.T
    left, found = torch.linalg.eigh(root @ covariance.double() @ root)
    first = found[:, -rank:]
    return float(left[:-rank].clamp(min=0).sum()) / 2, (inverse @ first @ first.T @ root).float()


def rows_of(model, text, count):
    """Every second row of a text."""
    tokens = model.tokenizer(text, return_tensors="pt").input_ids
    return [tokens[:, 2 * at * LENGTH : (2 * at + 1) * LENGTH] for at in range(count)]


def repeated(count, period, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.randint(1000, 40000, (period,), generator=generator) for _ in range(count))
    return [row.repeat(LENGTH // period + 1)[None, :LENGTH] for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    torch.manual_seed(0)
    model = Model(parser.parse_args().model)
    documents = list(topics.topics.values())
    code = ["\n".join(map(inspect.getsource, modules)) for modules in ((argparse, logging), (tarfile, statistics))]
    seen = rows_of(model, "\n\n".join(documents[::2]), 4) + rows_of(model, code[0], 2) + repeated(2, 200, 1)
    held = rows_of(model, "\n\n".join(documents[1::2]), 4) + rows_of(model, code[1], 4)
    copied = repeated(4, 128, 7)
    pairs, fisher, covariance, mean = model.moments(seen)
    base, base_copied = model.losses(held), model.losses(copied, 128)
    places = [(layer, group) for layer in range(model.layers) for group in range(model.groups)]

    def tell(name):
        rise = model.losses(held) - base
        copying = float((model.losses(copied, 128) - base_copied).mean())
        print(f"{name:28} text {rise.mean():+.4f} ± {rise.std() / len(rise) ** 0.5:.4f}  copying {copying:+.3f}")
        sys.stdout.flush()

    for part in (0.75, 0.5):
        rank = round(part * model.size)
        by_pairs = {place: pairs_to_keep(pairs[place], rank // 2) for place in places}
        by_rank = {place: projection(fisher[place], covariance[place], rank) for place in places}
        for count, name in ((len(places) // 2, "half"), (len(places), "all")):
            model.kept = torch.ones(model.layers, model.groups, model.size // 2)
            for place in sorted(places, key=lambda place: by_pairs[place][0])[:count]:
                model.kept[place] = by_pairs[place][1]
            tell(f"pairs, {part:.0%} kept, {name}")
            model.kept, made = None, torch.eye(model.size).repeat(model.layers, model.groups, 1, 1)
            for place in sorted(places, key=lambda place: by_rank[place][0])[:count]:
                made[place] = by_rank[place][1]
            model.projected = made, mean
            tell(f"rank,  {part:.0%} kept, {name}")
            model.projected = None


if __name__ == "__main__":
    main()
