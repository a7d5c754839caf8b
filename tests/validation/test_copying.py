"""The copying probe and the comparison of two models' predictions, against computations of their own."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sa_convert.errors import CheckpointError, DataError, OutputError
from sa_convert.measure.quality.copying import Probes, copying_loss, copying_probes
from sa_convert.measure.quality.divergence import Comparison, KeptLogits, kl_divergence
from sa_convert.models.tokens import ordinary_tokens
from support.validation_models import VOCABULARY, tiny_config, tokenizer


class Rule(torch.nn.Module):
    """A model whose logits of the next token are a function of the tokens so far."""

    def __init__(self, logits):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 1)
        self.logits = logits

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=torch.stack([self.logits(row) for row in input_ids]))


def copier(distance):
    """Sure of the token that stood `distance` before the next one; knows nothing at the beginning."""

    def logits(row):
        scores = torch.zeros(len(row), VOCABULARY)
        for place in range(distance - 1, len(row)):
            scores[place, row[place + 1 - distance]] = 50.0
        return scores

    return Rule(logits)


def test_probes_repeat_and_are_random():
    probes = copying_probes(range(10, VOCABULARY), period=20, length=70, probes=4, seed=3, start=(0,))
    assert probes.shape == (4, 70)
    assert probes.dtype == torch.int64
    assert (probes[:, 0] == 0).all()
    for row in probes.tolist():
        once = row[1:21]
        assert len(set(once)) == 20
        assert min(once) >= 10
        assert row[1:] == (once * 4)[:69]
    assert len({tuple(row) for row in probes.tolist()}) == 4
    again = {"period": 20, "length": 70, "probes": 4, "start": (0,)}
    assert probes.equal(copying_probes(range(10, VOCABULARY), seed=3, **again))
    assert not probes.equal(copying_probes(range(10, VOCABULARY), seed=4, **again))


def test_small_vocabulary_is_used_evenly():
    once = copying_probes([5, 6, 7], period=8, length=16, probes=1)[0, :8].tolist()
    assert sorted(once.count(token) for token in (5, 6, 7)) == [2, 3, 3]


@pytest.mark.parametrize("start", [(), (0,)])
def test_copying_loss_equals_a_loop(start):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config()).eval()
    probes = copying_probes(range(2, VOCABULARY), period=16, length=56, probes=3, start=start)
    with torch.no_grad():
        logits = model(probes).logits.double().numpy()
    losses = {}
    for row, tokens in zip(logits, probes.tolist(), strict=True):
        for place in range(len(start) + 16, 56):
            loss = math.log(np.exp(row[place - 1]).sum()) - row[place - 1][tokens[place]]
            losses.setdefault((place - len(start)) // 16, []).append(loss)
    measured = copying_loss(model, probes, 16)
    every = [loss for occurrence in losses.values() for loss in occurrence]
    assert measured.tokens == len(every) == 3 * (40 - len(start))
    assert measured.loss == pytest.approx(np.mean(every), rel=1e-5)
    assert measured.by_occurrence == pytest.approx([np.mean(losses[number]) for number in (1, 2, 3)], rel=1e-5)


def test_a_model_that_copies_over_one_distance_only():
    probes = Probes(tuple(range(2, VOCABULARY)), (), 512, 0)
    assert (probes.period, probes.distances) == (128, (32, 64, 128, 256))
    found = {copying.distance: copying for copying in probes.losses(copier(128))}
    assert found[128].loss == pytest.approx(0, abs=1e-6)
    assert found[128].tokens == 8 * 384
    assert len(found[128].by_occurrence) == 3
    # It knows nothing of the first 128 tokens, and is wrong by 50 nats later where another token follows.
    assert found[64].by_occurrence == pytest.approx([math.log(VOCABULARY)], rel=1e-5)
    assert found[256].loss == pytest.approx(50, rel=0.01)


def test_probes_fit_the_positions():
    assert Probes((2, 3), (0,), 257, 0).distances == (32, 64, 128)
    short = Probes((2, 3), (0,), 200, 0)
    assert (short.period, short.distances) == (99, (32, 64, 99))
    assert short.tokens(99).shape == (8, 200)


def test_nothing_repeats():
    with pytest.raises(ValueError, match="no token"):
        copying_loss(copier(4), torch.arange(2, 20)[None], 4)


def test_ordinary_tokens_are_no_special_added_or_unembedded_ones():
    words = tokenizer()
    words.add_tokens(["added", "beyond"])
    added = words.convert_tokens_to_ids("added")
    found = ordinary_tokens(words, added + 1)
    assert found == list(range(2, added))
    assert ordinary_tokens(words, 50) == list(range(2, 50))
    with pytest.raises(DataError, match="1 ordinary tokens"):
        ordinary_tokens(words, 3)


def test_kl_equals_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(7, 50, generator=generator) * 4 for _ in range(2))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p.double()), torch.distributions.Categorical(logits=q.double())
    )
    assert kl_divergence(p, q).numpy() == pytest.approx(expected.numpy(), rel=1e-9)
    assert (kl_divergence(p, p) == 0).all()
    assert not torch.allclose(kl_divergence(p, q), kl_divergence(q, p))


def test_kl_of_impossible_tokens():
    p = torch.tensor([[0.0, 0.0, -math.inf]])
    q = torch.tensor([[0.0, 0.0, -math.inf], [0.0, 0.0, 0.0], [-math.inf, 0.0, 0.0]])
    assert kl_divergence(p.expand(3, -1), q).tolist() == pytest.approx([0, math.log(1.5), math.inf])


def test_comparison_counts_each_predicted_position(tmp_path):
    generator = torch.Generator().manual_seed(1)
    reference = [torch.randn(100, 30, generator=generator).to(torch.bfloat16) for _ in range(2)]
    other = [rows + 0.5 * torch.randn(100, 30, generator=generator) for rows in reference]
    kept = KeptLogits(tmp_path, 2)
    for rows in reference:
        kept.keep(rows[:-1])
    assert len(list(tmp_path.iterdir())) == 2
    comparison = Comparison(kept)
    for rows in other:
        comparison.add(rows[:-1])
    assert not list(tmp_path.iterdir())
    kl, same = 0.0, 0
    for p, q in zip(reference, other, strict=True):
        for place in range(99):
            a, b = np.float64(p[place].float()), np.float64(q[place])
            a, b = a - np.log(np.exp(a).sum()), b - np.log(np.exp(b).sum())
            kl += (np.exp(a) * (a - b)).sum()
            same += a.argmax() == b.argmax()
    assert comparison.agreement.tokens == 198
    assert comparison.agreement.kl == pytest.approx(kl / 198, rel=1e-9)
    assert comparison.agreement.top1 == same / 198


def test_logits_of_other_vocabularies_or_beyond_the_disk(tmp_path, monkeypatch):
    kept = KeptLogits(tmp_path, 1)
    kept.keep(torch.zeros(4, 30))
    with pytest.raises(CheckpointError, match="different vocabularies, of 31 and 30 tokens"):
        Comparison(kept).add(torch.zeros(4, 31))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1_000_000))
    with pytest.raises(OutputError, match=r"take 1\.2 MB .* 1\.0 MB are free .*TMPDIR.*fewer --sequences"):
        KeptLogits(tmp_path, 10).keep(torch.zeros(1000, 30))
    assert not list(tmp_path.iterdir())
