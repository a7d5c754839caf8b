"""`bench --turns`: what it measures, and what it refuses."""

import json
import shutil

import pytest
import torch

from sa_convert.errors import OutputError
from sa_convert.measure.speed.conversation_timer import ConversationTimer
from support.cli_cases import refused
from support.session_models import model_named
from support.tiny_models import save_tiny, save_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("turns") / "tiny"
    save_tiny("llama", folder)
    save_tokenizer(folder)
    return folder


def test_as_a_process(cli, model, tmp_path):
    out = tmp_path / "out"
    asked = ("--turns", 3, "--contexts", 60, "--message", 12, "--new-tokens", 6, "--repeats", 2)
    done = cli("bench", model, "--against", model, *asked, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads((out / "bench.json").read_text())
    assert [each["id"] for each in found["models"]] == ["tiny", "tiny"]
    turns = found["models"][0]["turns"]
    assert [(turn["history"], turn["new"]) for turn in turns] == [(0, 12), (20, 12), (40, 12)]
    assert all(turn["same_tokens"] for turn in turns)
    # A token of 6 layers with 4 KV groups of 16 numbers of 4 bytes.
    assert [turn["cache_bytes"] for turn in turns] == [6 * 2 * 4 * 16 * 4 * tokens for tokens in (20, 40, 60)]
    for number, turn in enumerate(turns):
        assert turn["cache_bytes"] < turn["file_bytes"] < turn["cache_bytes"] + 10_000
        assert (turn["kept_seconds"] is None) == (number == 0)
        if number:
            runs = zip(turn["kept_seconds"]["runs"], turn["recomputed_seconds"]["runs"], strict=True)
            saved = sorted(1 - kept / recomputed for kept, recomputed in runs)
            assert turn["saved"] == pytest.approx(sum(saved) / 2, abs=1e-4)
            assert turn["loading_seconds"]["median"] < turn["kept_seconds"]["median"]
    assert found["conditions"]["context"] == 60
    page = (out / "bench.md").read_text()
    assert page.count("| yes |") == 6
    assert (out / "bench.png").read_bytes()[:4] == b"\x89PNG"


def test_an_answer_from_a_file_that_differs_is_told(tmp_path, monkeypatch):
    """The session is changed between two turns: the answers are not the same any more."""
    from sa_convert.measure.speed import conversation_timer

    def load(file, model):
        session = conversation_timer_load(file, model)
        for layer in session.cache.layers:
            layer.values = -layer.values
        return session

    conversation_timer_load = conversation_timer.load
    said = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    timer = conversation_timer.ConversationTimer(model_named("base"), said, said[:, :0], 8, lambda: None)
    assert [turn.same_tokens for turn in timer.turns(tmp_path / "session", 1)] == [True, True]
    monkeypatch.setattr(conversation_timer, "load", load)
    assert [turn.same_tokens for turn in timer.turns(tmp_path / "session", 1)] == [True, False]


def test_a_disk_without_room_is_told_before_the_first_file(tmp_path, monkeypatch):
    """A token of 6 layers with 4 KV groups of 16 numbers of 4 bytes; the last session beside the one before."""
    needed = 6 * 2 * 4 * 16 * 4 * (60 + 40)
    said = torch.randint(3, 128, (3, 12), generator=torch.Generator().manual_seed(0))
    timer = ConversationTimer(model_named("base"), said, said[:, :3], 5, lambda: None)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(OutputError, match=f"Sessions take .* but .* free in .*{tmp_path.parent.name}"):
        timer.turns(tmp_path / "session", 1)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    assert len(timer.turns(tmp_path / "session", 1)) == 3


def test_in_the_terminal(cli, model):
    done = cli("bench", model, "--turns", 2, "--contexts", 40, "--message", 16, "--new-tokens", 4, "--repeats", 1)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "tiny"
    assert " ".join(lines[1].split()) == (
        "turn history new computed again from the file saved of that loading file cache writing same tokens"
    )
    assert lines[3].split()[:3] == ["2", "20", "16"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("--turns", 3, "--contexts", 60, "--new-tokens", 20), "have no room: give fewer --turns"),
        (("--turns", 2, "--contexts", 4096), "more than the model's 512 positions"),
    ],
)
def test_refused(cli, model, asked, message):
    refused(cli("bench", model, *asked), 1, message)


def test_wrong_usage(cli, model):
    for asked, message in (((), "Missing option '--against'"), (("--turns", 2, "--batches", 4), "do not go together")):
        done = cli("bench", model, *asked)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
