"""What processes of a launch give each other, and how they end together."""

import signal

import pytest

from support.processes import run_in_two

EXCHANGE = """
import torch
from sa_convert.commands import main as command_line
from sa_convert.errors import GateRefused
from sa_convert.models import processes

def work(*arguments, **options):
    with processes.launched():
        print("told by", rank)
        assert processes.gathered("ab" * (rank + 1)) == ["ab", "abab"]
        assert processes.from_first(lambda: ("first", rank)) == ("first", 0)
        assert processes.merged({rank: 1}) == {0: 1, 1: 1}
        assert processes.listed({"a": [rank], rank: [2]}) == {"a": [0, 1], 0: [2], 1: [2]}
        passed = []
        assert [number for number, _ in processes.shared("abcde", passed.append)] == list(range(rank, 5, 2))
        assert passed == list(["bd", "ace"][rank])
        assert processes.in_share("abcde") == 3 - rank
        mine = {"tensor": torch.full((2, 3), rank + 1.0), "number": 2.0}
        mine |= {"begun": torch.ones(3)} if rank else {"begun": 0.0, "alone": 1.5}
        sums = processes.summed(mine)
        assert sums["tensor"].tolist() == [[3.0] * 3] * 2
        assert sums["tensor"].dtype == torch.float32
        assert (sums["number"], sums["alone"], sums["begun"].tolist()) == (4.0, 1.5, [1.0] * 3)
        assert processes.summed({}) == {}
        END

command_line.cli.main = work
"""


@pytest.mark.parametrize(
    ("end", "statuses", "errors"),
    [
        ("return 0", [0, 0], []),
        ("if rank == 0: raise GateRefused('it is worse')", [3, 3], ["Error: it is worse"]),
        ("if rank == 1: raise ValueError('a bug')", [1, 1], ["Error: Unexpected ValueError: a bug"]),
        ("raise GateRefused('both are')", [3, 3], ["Error: both are"]),
        (
            f"if rank == 1: os.kill(os.getpid(), {int(signal.SIGKILL)})",
            [1, -signal.SIGKILL],
            ["Error: Another process of the launch has ended without a word"],
        ),
    ],
    ids=["well", "the first fails", "the second fails", "both fail", "the second is killed"],
)
def test_two_exchange_what_they_have_and_end_together(end, statuses, errors):
    done = run_in_two(prelude=EXCHANGE.replace("END", end))
    told = [line for one in done for line in one.stderr.splitlines() if line.startswith("Error")]
    assert [one.returncode for one in done] == statuses, told
    assert [line.startswith(error) for line, error in zip(told, errors, strict=True)] == [True] * len(errors)
    assert [one.stdout for one in done] == ["told by 0\n", ""]
