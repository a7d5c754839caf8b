"""Long text by position, needles and copying by distance, against computations of their own."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sa_convert.domain.losses import LossChange, Losses, Mean
from sa_convert.errors import DataError, SaConvertError
from sa_convert.jobs.evaluating import EvaluateOptions, evaluate
from sa_convert.measure.quality.copying import Probes, copying_probes
from sa_convert.measure.quality.long_text import by_position, edges, token_losses
from sa_convert.measure.quality.needle import CODE, MOST, NAMES, ROWS, needles
from sa_convert.models.tokens import long_sequences
from sa_convert.texts.text import load_text
from support.cli_cases import refused
from support.processes import run_cli
from support.validation_models import VOCABULARY, save_base, save_converted, tiny_config, tokenizer

TEXT = load_text("builtin").split("validation", ("prose", "code"))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def converted(base) -> Path:
    return save_converted(base, base.parent / "converted")


class Finder(torch.nn.Module):
    """Sure of the token that followed the last `known` tokens where they stood before, if that is within `reach`."""

    def __init__(self, known: int, reach: int):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 1)
        self.known, self.reach = known, reach

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, use_cache=False):
        row = input_ids[0].tolist()
        scores = torch.zeros(1, len(row), VOCABULARY)
        last: dict[tuple[int, ...], int] = {}
        for place in range(self.known, len(row)):
            seen = tuple(row[place + 1 - self.known : place + 1])
            before = last.get(seen)
            if before is not None and place - before <= self.reach:
                scores[0, place, row[before + 1]] = 50.0
            last[seen] = place
        return SimpleNamespace(logits=scores)


def losses_by_hand(model, rows) -> np.ndarray:
    with torch.no_grad():
        logits = model(rows, use_cache=False).logits[:, :-1].double().numpy()
    chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(chances, rows[:, 1:, None].numpy(), -1)[..., 0]


def test_means_and_paired_differences_equal_numpy():
    generator = np.random.default_rng(0)
    before, after = generator.normal(3, 1, 7), generator.normal(3.1, 1, 7)
    error = lambda values: values.std(ddof=1) / math.sqrt(len(values))  # noqa: E731
    change = LossChange(Losses(tuple(before)), Losses(tuple(after)))
    assert change.before.error == pytest.approx(error(before))
    assert change.rise.value == pytest.approx((after - before).mean())
    assert change.rise.error == pytest.approx(error(after - before))
    assert change.increase == pytest.approx(np.exp(after.mean()) / np.exp(before.mean()) - 1)
    # An error of the increase is the slope of exp, times that of the rise.
    assert change.increase_error == pytest.approx(np.exp((after - before).mean()) * error(after - before))
    assert Mean.of((2.0,)) == Mean(2.0, None)
    with pytest.raises(ValueError, match="needs a value"):
        Mean.of(())


def test_loss_by_position_equals_a_loop(base):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    rows = long_sequences(tokenizer(), TEXT, 3, 130)
    by_hand = losses_by_hand(model, rows)
    losses = token_losses(model, rows, "text")
    assert losses.numpy() == pytest.approx(by_hand, rel=1e-4)
    assert token_losses(model, rows, "text", last=20).numpy() == pytest.approx(by_hand[:, -20:], rel=1e-4)
    assert edges(130) == [0, 16, 32, 65, 130]
    for at, (start, stop) in zip(by_position(losses), ((0, 16), (16, 32), (32, 65), (65, 130)), strict=True):
        assert (at.start, at.stop) == (start, stop)
        for sample, row in zip(at.losses.samples, by_hand, strict=True):
            # The token at position p is the target number p - 1; nothing predicts the first.
            of = [row[position - 1] for position in range(start, stop) if position > 0]
            assert sample == pytest.approx(np.mean(of), rel=1e-4)


def test_stretches_of_positions_double():
    assert edges(2048) == [0, 256, 512, 1024, 2048]
    assert edges(3) == [0, 3]


def test_a_text_fills_as_many_sequences_as_it_can(tmp_path):
    words = tokenizer()
    tokens = [token for document in TEXT.documents for token in words(document.text)["input_ids"]]
    rows = long_sequences(words, TEXT, 2, 100)
    assert rows.flatten().tolist() == tokens[:200]
    (tmp_path / "short.txt").write_text("Some words of a short text. " * 20)
    short = load_text(str(tmp_path / "short.txt")).split("validation")
    filled = sum(len(words(document.text)["input_ids"]) for document in short.documents)
    assert len(long_sequences(words, short, 50, 20)) == filled // 20
    assert long_sequences(words, short, 1, filled + 1) is None


def test_needles_are_where_they_are_said_to_be():
    words = tokenizer()
    text = long_sequences(words, TEXT, 3, 800)
    vocabulary = range(2, VOCABULARY)
    planted = needles(words, text, vocabulary, seed=3)
    assert planted.tokens.shape == (ROWS, 800)
    assert planted.places.shape == (ROWS, len(planted.depths), CODE)
    assert planted.tokens.equal(needles(words, text, vocabulary, seed=3).tokens)
    assert not planted.tokens.equal(needles(words, text, vocabulary, seed=4).tokens)
    for row, places in zip(planted.tokens, planted.places, strict=True):
        said = [name for name in NAMES if f"The code of {name} is" in words.decode(row)]
        assert len(said) == len(planted.depths)
        statements = []
        for place in places.tolist():
            assert place == list(range(place[0], place[0] + CODE))
            asked = words.decode(row[place[0] - 60 : place[0]]).rpartition("\n")[2]
            name = next(name for name in said if asked == f"The code of {name} is")
            opening = words(f"\nThe code of {name} is")["input_ids"]
            statement = [*opening, *row[place].tolist()]
            found = [
                at for at in range(800 - len(statement) + 1) if row[at : at + len(statement)].tolist() == statement
            ]
            assert len(found) == 2, "once planted, and once asked"
            assert found[1] == place[0] - len(opening)
            statements.append(found[0])
        assert statements == sorted(statements)
        ends = places[:, -1].max().item() + 1
        assert words.decode(row[ends:]) == ".\n"
        rooms = [statement / 800 for statement in statements]
        assert all(abs(room - depth) < MOST for room, depth in zip(rooms, planted.depths, strict=True))


def test_a_model_finds_the_needles_within_its_reach():
    words = tokenizer()
    planted = needles(words, long_sequences(words, TEXT, 2, 1200), range(2, VOCABULARY))
    found = planted.losses(Finder(known=12, reach=10_000))
    assert [at.depth for at in found] == [0.1, 0.3, 0.5, 0.7, 0.9]
    for at in found:
        assert len(at.losses.samples) == ROWS
        assert at.losses.samples == pytest.approx([0.0] * ROWS, abs=1e-6)
    near = {at.label: at.losses.mean for at in planted.losses(Finder(known=12, reach=500))}
    assert near["90%"] == pytest.approx(0, abs=1e-6)
    assert near["10%"] == near["30%"] == pytest.approx(math.log(VOCABULARY), rel=1e-5)


def test_needles_fit_or_there_are_none():
    words = tokenizer()
    assert needles(words, long_sequences(words, TEXT, 2, 40), range(2, VOCABULARY)) is None
    few = needles(words, long_sequences(words, TEXT, 2, 200), range(2, VOCABULARY))
    assert few.tokens.shape == (ROWS, 200)
    assert 1 <= len(few.depths) < 5
    started = torch.cat([torch.zeros(2, 1, dtype=torch.long), long_sequences(words, TEXT, 2, 199)], dim=1)
    assert (needles(words, started, range(2, VOCABULARY), start=(0,)).tokens[:, 0] == 0).all()


def test_copying_over_long_distances():
    assert Probes((2, 3), (), 2048, 0).long_distances == (64, 128, 256, 512, 1024)
    assert Probes((2, 3), (0,), 2048, 0).long_distances[-1] == 1024
    assert Probes((2, 3), (), 127, 0).long_distances == ()
    vocabulary = tuple(range(2, VOCABULARY))
    # The tokens do not depend on the length, so that measurements at several lengths are of the same.
    short, long = (Probes(vocabulary, (0,), length, 7).tokens(64)[:, :129] for length in (512, 2048))
    assert short.equal(long)
    assert short.equal(copying_probes(vocabulary, period=64, length=129, seed=7, start=(0,)))
    probes = Probes(vocabulary, (0,), 256, 0)
    # A token at the start leaves no room for the last one of the second occurrence.
    copying = probes.loss_at(AutoModelForCausalLM.from_config(tiny_config()).eval(), 128)
    assert copying.tokens == 8 * 127
    assert np.mean(copying.probes) == pytest.approx(copying.second)


def test_long_text_against_models_run_by_hand(base, converted):
    arguments = ["--sequences", 2, "--length", 64, "--long", 200, "--seed", 5, "--device", "cpu", "--json"]
    result = run_cli("evaluate", converted, "--against", base, *arguments)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    rows = long_sequences(tokenizer(), TEXT, 4, 200)
    losses = losses_by_hand(AutoModelForCausalLM.from_pretrained(base).eval(), rows).mean(axis=1)
    told = found["against"]["long_text"]
    assert (told["length"], told["sequences"]) == (200, 4)
    assert told["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert told["perplexity"] == pytest.approx(np.exp(losses.mean()), rel=1e-5)
    assert told["error"] == pytest.approx(losses.std(ddof=1) / 2, rel=1e-3)
    assert [(at["from"], at["to"]) for at in told["by_position"]] == [(0, 25), (25, 50), (50, 100), (100, 200)]
    for key in ("model", "against"):
        assert [at["distance"] for at in found[key]["copying"]["by_distance"]] == [32, 64, 128]
        assert found[key]["needle"].keys() == found["change"]["needle"].keys() != set()
    change = found["change"]["long_text"]
    assert (change["before"], change["after"]) == (told["perplexity"], found["model"]["long_text"]["perplexity"])
    assert change["increase"] == pytest.approx(change["after"] / change["before"] - 1, rel=1e-2)
    assert found["change"]["copying"].keys() == {"32", "64", "128"}


def test_long_text_in_a_terminal(base):
    result = run_cli("evaluate", base, "--sequences", 2, "--length", 64, "--long", 256, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    for line in ("Perplexity of 256 tokens", "  at 128-255", "Needle at depth", "  at distance 128"):
        assert any(shown.startswith(line) for shown in result.stdout.splitlines()), result.stdout


def test_the_length_of_long_text(base, tmp_path):
    options = {"sequences": 2, "length": 64, "device": "cpu"}
    # 256 positions: no more than the 512 tokens of ordinary text.
    assert evaluate(str(base), None, load_text("builtin"), EvaluateOptions(**options)).model.long is None
    far = save_base(tmp_path / "far", max_position_embeddings=520)
    assert evaluate(str(far), None, load_text("builtin"), EvaluateOptions(**options)).model.long.length == 520
    assert evaluate(str(far), None, load_text("builtin"), EvaluateOptions(**options, long=0)).model.long is None
    with pytest.raises(SaConvertError, match="--long 257 is more than the 256 positions"):
        evaluate(str(base), None, load_text("builtin"), EvaluateOptions(**options, long=257))
    short = tmp_path / "short.txt"
    short.write_text("Some words of a short text. " * 25)
    with pytest.raises(DataError, match=r"fewer than 520 tokens, which --long 520 needs: give a longer"):
        evaluate(str(far), None, load_text(str(short)), EvaluateOptions(**options, long=520))
    result = run_cli("evaluate", far, "--text", short, "--sequences", 2, "--length", 64, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert "so nothing is measured of long text" in result.stderr
    refused(run_cli("evaluate", base, "--long", 300, "--device", "cpu"), 1, "--long 300 is more than the 256 positions")
