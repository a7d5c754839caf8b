"""The loss, the rows, the verdict and the learning rate, each against a computation of its own."""

import math
import sys

import pytest
import torch
from torch import nn

from sa_convert.domain.heal_settings import HealSettings
from sa_convert.domain.healed import Judgement
from sa_convert.errors import SaConvertError
from sa_convert.heal import distillation, distilled
from sa_convert.heal.budget_clock import Clock, time_left
from sa_convert.heal.distilled import Distilled, HeadDivergence, Teacher, head_of, last_states
from sa_convert.heal.healing_state import HealingState
from sa_convert.heal.healing_text import HealingRows
from sa_convert.heal.healing_trainer import judgements
from sa_convert.heal.healing_verdict import best, worse
from sa_convert.heal.trained import _with_additions
from support.tiny_models import save_tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two of one family that share embeddings and head: teacher and student."""
    folder = tmp_path_factory.mktemp("models")
    teacher = save_tiny("llama", folder / "one", seed=1)
    student = save_tiny("llama", folder / "one", seed=1)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "layers.3" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return teacher, student


def tokens_and_scored():
    tokens = torch.randint(5, 110, (3, 20), generator=torch.Generator().manual_seed(5))
    scored = torch.ones(3, 20, dtype=torch.bool)
    scored[:, 0] = False
    scored[2, :11] = False
    return tokens, scored


def slow_loss(teacher, student, tokens, scored):
    """Mean over rows of the mean over scored tokens of KL(teacher || student), from whole logits."""
    rows = []
    wanted, found = teacher(tokens).logits.detach(), student(tokens).logits
    for row in range(len(tokens)):
        parts = []
        for place in range(1, tokens.shape[1]):
            if scored[row, place]:
                p = torch.log_softmax(wanted[row, place - 1], -1)
                q = torch.log_softmax(found[row, place - 1], -1)
                parts.append((p.exp() * (p - q)).sum())
        rows.append(torch.stack(parts).mean())
    return torch.stack(rows).mean()


@pytest.mark.parametrize("whole", [False, True], ids=["chunks", "whole logits"])
def test_loss_and_gradients_are_those_of_whole_logits(models, monkeypatch, whole):
    teacher, student = models
    monkeypatch.setattr(distilled, "CHUNK", 128 * 7)  # seven positions at a time
    tokens, scored = tokens_and_scored()
    parameter = student.model.layers[3].self_attn.o_proj.weight
    student.zero_grad()
    expected = slow_loss(teacher, student, tokens, scored)
    expected.backward()
    gradient = parameter.grad.clone()
    student.zero_grad()
    head = None if whole else head_of(student, teacher, tokens)
    assert whole or head is not None
    wanted = Teacher(teacher, not whole)(tokens, torch.tensor([-1, -1, -1]))
    model = Distilled(student, head, False).train()
    loss = model(tokens=tokens, scored=scored, wanted=wanted)["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


def test_logits_of_a_batch_are_never_in_memory(models, monkeypatch):
    teacher, student = models
    tokens, scored = tokens_and_scored()
    head = head_of(student, teacher, tokens)
    monkeypatch.setattr(distilled, "CHUNK", 128 * 7)
    seen = []
    handle = student.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.numel() // 128))
    wanted = Teacher(teacher, True)(tokens, torch.tensor([-1, -1, -1]))
    Distilled(student, head, False).train()(tokens=tokens, scored=scored, wanted=wanted)
    handle.remove()
    assert max(seen) <= 7


def test_what_a_model_is_measured_by(models):
    """Losses as transformers computes them."""
    teacher, student = models
    tokens, _ = tokens_and_scored()
    scored = torch.ones(tokens.shape, dtype=torch.bool)
    scored[:, 0] = False
    found = Distilled(student, head_of(student, teacher, tokens), False).eval()(tokens=tokens, scored=scored)
    assert found["losses"].mean().item() == pytest.approx(student(tokens, labels=tokens).loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("model_type", "changes", "found"),
    [
        ("cohere", {"logit_scale": 0.25}, True),
        ("granite", {"logits_scaling": 3.0}, True),
        ("gemma2", {"final_logit_softcapping": 0.5}, True),
    ],
)
def test_heads_of_families(tmp_path, model_type, changes, found):
    """What follows the head (a factor, a soft cap) is found; the function gives the model's logits."""
    model = save_tiny(model_type, tmp_path, **changes)
    tokens = torch.randint(5, 110, (1, 12), generator=torch.Generator().manual_seed(5))
    head = head_of(model, model, tokens)
    with torch.no_grad():
        torch.testing.assert_close(head(last_states(model, tokens)), model(tokens).logits, rtol=1e-3, atol=1e-4)


def test_other_heads_are_not_taken_for_the_same(models):
    """Then logits are compared whole."""
    teacher, student = models
    tokens, _ = tokens_and_scored()
    kept = student.lm_head.weight.data
    student.lm_head.weight.data = kept + 0.1 * torch.randn(kept.shape, generator=torch.Generator().manual_seed(3))
    try:
        assert head_of(student, teacher, tokens) is None
    finally:
        student.lm_head.weight.data = kept


def test_impossible_tokens_add_nothing():
    states = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    head = nn.Linear(3, 5).requires_grad_(False)
    barred = torch.tensor([0.0, -math.inf, 0.0, 0.0, 0.0])
    loss = HeadDivergence.apply(states, states.detach() + 1, torch.ones(4), lambda x: head(x) + barred)
    loss.backward()
    assert math.isfinite(float(loss))
    assert bool(torch.isfinite(states.grad).all())


def test_teacher_is_asked_once_for_each_row_of_text(models, tmp_path):
    teacher, _ = models
    tokens, _ = tokens_and_scored()
    asked = []
    handle = teacher.model.register_forward_pre_hook(lambda module, inputs, named: asked.append(1), with_kwargs=True)
    try:
        answers = Teacher(teacher, True, 3, tmp_path / "kept.bin")
        first = answers(tokens, torch.tensor([2, 0, -1]))
        again = answers(tokens, torch.tensor([2, 0, -1]))
    finally:
        handle.remove()
    assert len(asked) == 4
    assert first.equal(again)


def rows_of(length=64, count=400):
    text = torch.arange(7 * length).view(7, length) % 50 + 200
    return HealingRows(text, list(range(10, 100)), [1], count, seed=4)


def test_one_row_in_four_is_fresh_repetition_often_with_a_long_period():
    rows, periods, seen = rows_of(), [], set()
    for index in range(400):
        row = rows[index]
        tokens, scored = row["tokens"], row["scored"]
        if index % 4 < 3:
            assert int(row["row"]) >= 0
            continue
        assert int(row["row"]) == -1
        period = int(scored.int().argmax()) - 1  # what is scored first is said for the second time
        assert tokens[0] == 1
        assert tokens[1 + period :].equal(tokens[1:-period])
        periods.append(period)
        seen.add(tuple(tokens[1:9].tolist()))
    assert len(seen) == len(periods)
    assert max(periods) > 24
    assert min(periods) <= 16
    assert sum(period >= 16 for period in periods) > len(periods) / 5


def test_text_is_read_in_another_order_each_time_and_whole():
    rows = rows_of()
    numbers = [int(rows[index]["row"]) for index in range(400) if index % 4 < 3]
    first, second = numbers[:7], numbers[7:14]
    assert sorted(first) == sorted(second) == list(range(7))
    assert numbers[:7] != numbers[7:14] or numbers[7:14] != numbers[14:21]
    assert [int(rows_of()[index]["row"]) for index in range(400) if index % 4 < 3] == numbers


def judged(tokens, prose, table, near, far):
    return Judgement(tokens, {"prose": prose, "table": table}, {"prose": 3.0, "table": 3.0}, {32: near, 256: far})


BASE, BEFORE = judged(0, 0.0, 0.0, 1.0, 1.5), judged(0, 0.2, 0.2, 1.3, 1.2)


@pytest.mark.parametrize(
    ("after", "blamed"),
    [
        (judged(9, 0.1, 0.1, 1.2, 1.5), []),
        (judged(9, 0.1, 0.1, 1.0, 1.5), []),  # at 256 as the base, which is worse than before
        (judged(9, 0.2, 0.2, 1.0, 1.0), ["held-out text"]),
        (judged(9, 0.0, 0.25, 1.0, 1.0), ["divergence on table"]),
        (judged(9, 0.1, 0.1, 1.4, 1.0), ["copying over 32 tokens"]),
        (judged(9, 0.1, 0.1, 1.3, 1.6), ["copying over 256 tokens", "copying 1.250"]),
        (judged(9, math.nan, 0.1, 1.0, 1.0), ["not finite"]),
    ],
)
def test_worse_on_either_is_refused(after, blamed):
    told = worse(after, BEFORE, BASE)
    assert len(told) == len(blamed)
    for one, expected in zip(told, blamed, strict=True):
        assert expected in one


def test_best_of_those_that_are_no_worse():
    curve = [BEFORE, judged(1, 0.1, 0.1, 1.0, 1.5), judged(2, 0.01, 0.01, 2.0, 1.0), judged(3, 0.12, 0.1, 1.0, 1.5)]
    assert best(curve, BASE) == 1
    assert best(curve[:1], BASE) is None


def test_learning_rate_warms_up_and_falls_by_a_cosine():
    clock = Clock(steps=100, limit=None)
    rates = [clock.rate(step) for step in range(100)]
    assert rates[9] == pytest.approx(0.95, abs=0.01)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.5, abs=0.02)
    assert rates[-1] < 0.001


def test_whatever_ends_first_counts():
    clock = Clock(steps=100, limit=10.0, earlier=5.0)
    clock.note(torch.device("cpu"))
    assert clock.used(20) == pytest.approx(0.5, abs=0.05)
    assert clock.used(80) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("tokens", "times"), [(20_000, 2), (100_000, 6), (400_000, 8), (2_000_000, 20), (20_000_000, 40)]
)
def test_longer_runs_are_judged_more_often(tokens, times):
    assert judgements(HealSettings(tokens=tokens)) == times


def test_what_the_base_writes_counts_as_time():
    assert time_left(None, 30.0) is None
    assert time_left(2, 30.0) == 90.0
    assert time_left(2, 300.0) == 1.0  # a step, so that there is a judgement


def test_writing_is_told_its_part_of_the_minutes(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(distillation, "written_by", lambda *args: told.append(args[-1]) or torch.zeros(2, 64))
    for number, budget in enumerate(({"minutes": 2}, {"tokens": 4096})):
        settings = HealSettings(text="written", length=64, **budget)
        rows, seconds = distillation._written(
            None, None, settings, HealingState.open(tmp_path / str(number), {}, False)
        )
        assert rows.shape == (2, 64)
        assert seconds >= 0
    assert told == [30.0, math.inf]


def test_low_rank_additions_need_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SaConvertError, match=r"pip install 'sa-convert\[lora\]'"):
        _with_additions(None, None, {}, HealSettings(train="lora"))


def test_settings_are_spelled_out():
    long = HealSettings().resolved("builtin", True, 1024)
    assert (long.length, long.tokens, long.rate, long.text) == (1024, 400_000, 1e-4, "builtin+written")
    timed = HealSettings(minutes=15, train="layers").resolved("my.txt", False, None)
    assert (timed.length, timed.tokens, timed.rate, timed.text) == (512, None, 1e-4, "my.txt")
