"""A short part of `make fuzz` (tests/support/fuzz), with a fixed seed; and its parts that must themselves be right."""

import json
import os
import random
import time
from pathlib import Path

import click
import pytest

from sa_convert.commands import main
from sa_convert.errors import CheckpointError
from support.fuzz import subjects as base
from support.fuzz.cases import KINDS, Case, case_names, make_case
from support.fuzz.gguf_file import tiny_gguf
from support.fuzz.judge import judge
from support.fuzz.kills import RECIPE, large_model, measure, run_kills
from support.fuzz.mutate_bytes import mutate_bytes
from support.fuzz.mutate_json import mutate_json
from support.fuzz.page import BEGIN, END, write_page
from support.fuzz.races import run_races
from support.fuzz.subjects import make_subjects
from support.fuzz.workers import Tally, run_cases

# .gguf files take torch to read, and are left to `make fuzz`.
QUICK = tuple(kind for kind in KINDS if kind != "gguf")


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    return make_subjects(tmp_path_factory.mktemp("fuzz") / "subjects", families=False)


def in_time(seconds=300):
    return time.monotonic() + seconds


def test_damaged_input_is_refused_in_one_line_and_leaves_nothing(subjects, tmp_path):
    names = case_names(250, QUICK)
    tally = run_cases(names, 1, subjects, tmp_path / "keep", 1, in_time())
    assert tally.findings == []
    assert tally.cases == 250
    assert tally.refused.total() > 120
    assert tally.accepted.total() > 20


def test_killed_runs_leave_nothing_that_the_next_run_does_not_remove(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    (tmp_path / "kills").mkdir()
    scene = measure(large_model(tmp_path / "model", 44), recipe, tmp_path, "--no-validate")
    kills = run_kills([(scene, 4)], 1, tmp_path / "kills", 1, in_time())
    assert kills.findings == []
    assert kills.count == 4


def test_two_runs_into_one_destination(tmp_path):
    (tmp_path / "races").mkdir()
    races = run_races(large_model(tmp_path / "model", 44), 2, 1, tmp_path / "races", in_time())
    assert races.findings == []
    assert races.count == 2


def test_a_name_gives_the_same_case_again(subjects, tmp_path):
    for kind in KINDS:
        told = []
        for folder in (tmp_path / kind / "a", tmp_path / kind / "b"):
            folder.mkdir(parents=True)
            case = make_case(f"{kind}:5", 1, folder, subjects)
            files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            told.append(([part.replace(str(folder), "") for part in case.arguments], files))
        assert told[0] == told[1]


def test_kinds_come_in_turn():
    names = case_names(1000)
    assert len(set(names)) == 1000
    assert {name.partition(":")[0] for name in names[:60]} == set(KINDS)


def test_mutations_change_things(subjects):
    text = (subjects.folder(base.SHARDED) / "model.safetensors.index.json").read_text()
    for mutate, given in ((mutate_json, text), (mutate_bytes, text.encode())):
        found = {mutate(given, random.Random(number)) for number in range(200)}
        assert len(found) > 150


def test_the_undamaged_gguf_file_is_one_that_llama_cpp_s_reader_takes(tmp_path):
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "x.gguf"
    file.write_bytes(tiny_gguf().encode())
    reader = gguf.GGUFReader(file)
    assert len(reader.tensors) == 3 + 4 * 9
    assert [int(size) for size in reader.tensors[0].shape] == [32, 40]


# Faults planted into the command, which the judge must find.


def _unexpected(output):
    raise ValueError("boom")


def _exits(output):
    raise SystemExit(1)


def _two_errors(output):
    click.echo("Error: one", err=True)
    raise CheckpointError("two")


def _writes_to_stdout(output):
    click.echo("1")
    raise CheckpointError("x")


def _leaves_a_file(output):
    Path(output).with_name(".out.left").touch()
    raise CheckpointError("x")


def _colours(output):
    click.echo("\u202e")


def _hangs(output):
    while True:
        pass


def _another_status(output):
    return 7


def _warns(output):
    click.echo("warning", err=True)
    raise CheckpointError("x")


def _writes_nothing(output):
    Path(output).mkdir()


def _refuses(output):
    raise CheckpointError("a" * 5000 + "\x1b")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (_unexpected, "an error that nobody expected"),
        (_exits, "SystemExit leaves the command"),
        (_two_errors, "two lines of error"),
        (_writes_to_stdout, "text on standard output"),
        (_leaves_a_file, "left behind or changed: .out.left"),
        (_colours, "'\\u202e' would reach the terminal"),
        (_hangs, "hangs: not done after 1 s"),
        (_another_status, "exit status 7"),
        (_warns, "another line beside the error: warning"),
        (_writes_nothing, "the output lacks config.json"),
    ],
)
def test_the_judge_finds_planted_faults(tmp_path, monkeypatch, fault, told):
    verdict = judged(fault, tmp_path, monkeypatch)
    assert told in verdict.problem


def test_the_judge_takes_a_refusal(tmp_path, monkeypatch):
    """However long the message is, and whatever it quotes: the command sees to that."""
    assert judged(_refuses, tmp_path, monkeypatch).problem is None


def judged(fault, folder, monkeypatch):
    planted = click.command("convert")(click.argument("output")(fault))
    monkeypatch.setattr(main._LazyGroup, "get_command", lambda *_: planted)
    output = folder / "out"
    return judge(Case("planted", ("convert", str(output)), output), folder, seconds=1)


def test_a_process_that_dies_is_a_finding(subjects, tmp_path, monkeypatch):
    """The case that it was at is named, and the others are run."""
    names = ["header:0", "header:1", "header:2"]
    monkeypatch.setattr("support.fuzz.workers._work", dies_at_one)
    tally = run_cases(names, 1, subjects, tmp_path, 1, in_time())
    assert [(finding.case, finding.problem) for finding in tally.findings] == [("header:1", "the process ends with 9")]
    assert tally.cases == 3


def dies_at_one(news, names, *_):
    for name in names:
        news.send(("begin", name))
        if name == "header:1":
            os._exit(9)
        news.send(("end", name, 1, None, 0.0, 1))


def test_the_page_is_written_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    run = {"seed": 1, "seconds": 2, "processes": 1, "findings": []}
    result = {
        "damage": {**run, "asked": 10_000, "done": 3, "kinds": {"header": [1200, 2]}, "slowest_seconds": 0.5,
                   "peak_memory_bytes": 1},
        "kills": {**run, "asked": 2, "done": 2, "signals": {"SIGKILL": 2}, "reached": {"nothing was left": 2}},
        "disks": {**run, "refused": {"pages": 3}, "passed": {"pages": 1}, "not_run": ["files"]},
        "races": {**run, "asked": 1, "done": 1, "outcomes": {"one": 1}},
    }  # fmt: skip
    write_page(page, json.loads(json.dumps(result)))
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "| header of a safetensors file | 1,202 | 1,200 | 2 |" in text
    assert "| killed runs: 2 SIGKILL | 2 of 2 |" in text
    assert "| files | not run: mounting is not allowed here | |" in text


def test_counts_add_up():
    tally = Tally()
    tally.refused["header"] += 2
    tally.accepted["gguf"] += 1
    assert tally.cases == 3
