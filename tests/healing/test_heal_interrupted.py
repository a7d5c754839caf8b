"""A run that was interrupted goes on, and ends as one that was not."""

import signal
import time

import pytest
import torch

from sa_convert.heal.healing_state import HealingState
from support.healing_models import QUICK, all_tensors, damaged_conversion, heal_process
from support.processes import run_cli

SLOW = """
import time
from sa_convert.heal.healing_trainer import HealingTrainer
quick = HealingTrainer.compute_loss
def slow(*arguments, **named):
    time.sleep(0.05)
    return quick(*arguments, **named)
HealingTrainer.compute_loss = slow
"""

REFUSING = """
from sa_convert.errors import GateRefused
from sa_convert.measure.quality import verdict
def refuse(validation):
    raise GateRefused("The gate refused.")
verdict.refuse_if_failed = refuse
"""


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return damaged_conversion(tmp_path_factory.mktemp("heal"))


def interrupted(damaged, out, number):
    """A run that gets a signal after its first checkpoint; it has left that behind, and nothing else."""
    arguments = (damaged.folder, "--against", damaged.base, "-o", out, *QUICK, "--no-validate")
    process = heal_process(*arguments, prelude=SLOW)
    state = out.with_name(f"{out.name}.healing")
    deadline = time.monotonic() + 200
    while not list(state.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode != 0
    assert not out.exists()
    assert state.exists()
    return arguments, told


def test_resumed_run_gives_the_same_weights(damaged, tmp_path):
    arguments, told = interrupted(damaged, tmp_path / "parts", signal.SIGINT)
    assert "--resume goes on" in told.splitlines()[-1]
    assert "Traceback" not in told
    again = run_cli("heal", *arguments)
    assert again.returncode == 1
    assert "holds a healing that was interrupted: use --resume" in again.stderr
    other = run_cli("heal", *arguments, "--resume", "--rate", "2e-3")
    assert other.returncode == 1
    assert "was begun with other settings" in other.stderr
    resumed = run_cli("heal", *arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert not (tmp_path / "parts.healing").exists()
    whole = run_cli("heal", *arguments[:3], "-o", tmp_path / "whole", *QUICK, "--no-validate")
    assert whole.returncode == 0, whole.stderr
    one, two = all_tensors(tmp_path / "whole"), all_tensors(tmp_path / "parts")
    assert all(one[name].equal(two[name]) for name in one)


def test_an_ended_process_leaves_what_it_had(damaged, tmp_path):
    _, told = interrupted(damaged, tmp_path / "ended", signal.SIGTERM)
    assert "Traceback" not in told


def test_the_gate_may_be_widened_without_training_again(damaged, tmp_path):
    """What was trained waits beside the place that stays empty."""
    arguments = (damaged.folder, "--against", damaged.base, "-o", tmp_path / "out", *QUICK)
    refusing = heal_process(*arguments, prelude=REFUSING)
    _, told = refusing.communicate(timeout=200)
    assert refusing.returncode == 3, told
    assert "The gate refused. What was trained is kept in" in told
    assert [path.name for path in tmp_path.iterdir()] == ["out.healing"]
    done = run_cli("heal", *arguments, "--max-perplexity-increase", "90%", "--resume")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_text_that_the_base_wrote_is_not_written_again(tmp_path):
    state, asked = HealingState.open(tmp_path / "state", {"settings": 1}, False), []

    def write(first):
        asked.append(first)
        return torch.arange(first, first + 6).reshape(2, 3)

    rows, seconds = state.written(lambda: write(1))
    assert rows.equal(write(1))
    state.save(0.0)
    again = HealingState.open(tmp_path / "state", {"settings": 1}, True)
    rows, again_seconds = again.written(lambda: write(7))
    assert rows.equal(write(1))
    assert again_seconds == pytest.approx(seconds, abs=1e-3)
    assert 7 not in asked
    # A run that begins anew may have other settings.
    assert HealingState.open(tmp_path / "state", {"settings": 2}, False).written(lambda: write(7))[0].equal(write(7))


def test_nothing_to_go_on_with(damaged, tmp_path):
    done = run_cli("heal", damaged.folder, "--against", damaged.base, "-o", tmp_path / "out", *QUICK, "--resume")
    assert done.returncode == 1
    assert "there is no interrupted healing to go on with" in done.stderr
    assert not list(tmp_path.iterdir())
