"""What calibration sees of masked and sequence-to-sequence models: gradients and attention, against their own sums."""

from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from sa_convert.domain.geometry import LayerGeometry, ModelGeometry
from sa_convert.domain.plan import Plan
from sa_convert.domain.units import Units
from sa_convert.observe.gradients import fisher_gradients
from sa_convert.observe.probe import Seen
from sa_convert.observe.sequences import Sample
from sa_convert.observe.similarity import attention_statistics
from sa_convert.observe.tried import Reference
from support.task_models import opened, save

NAME = "test_tasks_watched"


class Watched:
    """A probe of any model, whose attentions are numbered as they are called. added: by layer, added to the output."""

    def __init__(self, model):
        self.model, self.added, self.numbers, self.observer = model, {}, {}, None
        AttentionInterface.register(NAME, self.attend)
        AttentionMaskInterface.register(NAME, eager_mask)
        model.requires_grad_(False)
        model.set_attn_implementation(NAME)

    def attend(self, module, query, key, value, attention_mask, scaling=None, position_bias=None, **_):
        layer = self.numbers.setdefault(module, len(self.numbers))
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        weights = sum(part for part in (scores, position_bias, attention_mask) if part is not None).softmax(-1)
        output = (weights @ value).transpose(1, 2)
        if self.observer is not None:
            rest = {"value": value, "output": output, "query": output, "key": value}
            self.observer(Seen(layer=layer, probabilities=weights, used=weights, **rest))
        return output + self.added.get(layer, 0), weights

    def trying(self, plan):
        return nullcontext()

    @contextmanager
    def observing(self, observer):
        self.observer = observer
        yield
        self.observer = None


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    return {kind: save(home / kind, kind) for kind in ("bert", "t5", "bart", "llama")}


def sample_of(task, tokens) -> Sample:
    return Sample(tokens, "text", task.scored(tokens[None])[0], task=task)


@pytest.mark.parametrize("kind", ["bert", "t5", "bart", "llama"])
def test_gradients_reach_every_attention(folders, kind):
    model, _, task, tokens = opened(folders[kind])
    probe, sample, shapes = Watched(model), sample_of(task, tokens[0]), {}

    def observe(seen):
        shapes[seen.layer] = seen.output.shape

    generator = torch.Generator().manual_seed(3)
    ((order, found),) = fisher_gradients(probe, sample, Plan(), observe, generator)
    assert order == "second"
    assert len(found) == {"bert": 2, "llama": 2}.get(kind, 6)
    # The same by adding nothing to each attention's output, as a variable.
    probe.added = {layer: torch.zeros(shape, requires_grad=True) for layer, shape in shapes.items()}
    inputs = sample.inputs(model)
    chances = model(**inputs.kwargs).logits[0].log_softmax(-1)
    labels = torch.multinomial(chances.detach().exp(), 1, generator=torch.Generator().manual_seed(3))[:, 0]
    places = inputs.scored[0].nonzero()[:, 0]
    functional.cross_entropy(chances[places], labels[places], reduction="sum").backward()
    for layer, added in probe.added.items():
        assert added.grad.abs().max() > 0
        assert torch.allclose(found[layer], added.grad[0], rtol=1e-3, atol=1e-6), layer


@pytest.mark.parametrize("kind", ["bert", "t5", "bart", "llama"])
def test_reference_measures_the_loss_of_what_is_scored(folders, kind):
    model, _, task, tokens = opened(folders[kind])
    probe, samples = Watched(model), [sample_of(task, row) for row in tokens]
    reference = Reference(probe, samples)
    inputs = task.batch(model, tokens)
    with torch.no_grad():
        logits = model(**inputs.kwargs).logits
    expected = functional.cross_entropy(logits[inputs.scored], inputs.labels[inputs.scored])
    assert reference.base.loss == pytest.approx(float(expected), rel=1e-5)
    assert reference.base.divergence == pytest.approx(0, abs=1e-6)
    assert reference.base.repetition_divergence is None
    with torch.no_grad():
        probe.added = {0: torch.ones(1)}
        changed = model(**inputs.kwargs).logits
        kl = functional.kl_div(changed.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="none")
        assert reference.measure(Plan()).divergence == pytest.approx(float(kl.sum(-1)[inputs.scored].mean()), rel=1e-3)


def test_attention_of_an_encoder_is_compared_over_all_pairs_of_tokens(folders):
    model, _, task, tokens = opened(folders["bert"])
    probe, sample = Watched(model), sample_of(task, tokens[0])
    found = attention_statistics(probe, Units(ModelGeometry((LayerGeometry(4, 4, 8),) * 2)), [sample])
    weights = {}
    with torch.no_grad(), probe.observing(lambda seen: weights.update({seen.layer: seen.probabilities[0].numpy()})):
        model(**sample.inputs(model).kwargs)
    one, other = (weights[layer].reshape(4, -1) for layer in (0, 1))
    cosines = one @ other.T / np.linalg.norm(one, axis=1)[:, None] / np.linalg.norm(other, axis=1)
    assert found.similarity[0][1] == pytest.approx(np.diag(cosines).mean(), rel=1e-5)
    assert found.variance == pytest.approx([weights[at].var(axis=-1).mean() for at in (0, 1)], rel=1e-4)


def test_attention_of_different_stacks_is_not_compared(folders):
    model, _, task, tokens = opened(folders["t5"])
    order = ("encoder", "encoder", "decoder", "decoder.cross", "decoder", "decoder.cross")
    units = Units(ModelGeometry(tuple(LayerGeometry(4, 4, 8, stack=stack) for stack in order)))
    found = attention_statistics(Watched(model), units, [sample_of(task, row) for row in tokens])
    for one, row in zip(order, found.similarity, strict=True):
        assert [value is not None for value in row] == [one == other for other in order]
    assert all(0 < value < 1 for value in found.isotropy)
