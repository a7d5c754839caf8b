"""Tests lie where tests/README.md says."""

import re

from support.processes import ROOT

TESTS = ROOT / "tests"


def test_every_folder_has_a_promise():
    promised = re.findall(r"^\| `(\w+)` \| .+ \|$", (TESTS / "README.md").read_text(), re.MULTILINE)
    folders = [path.name for path in TESTS.iterdir() if path.is_dir() and path.name[0] not in "_."]
    assert sorted(promised) == sorted(folders)


def test_support_holds_no_tests_and_other_folders_nothing_else():
    stray = [path for path in TESTS.rglob("*.py") if path.name.startswith("test_") == ("support" in path.parts)]
    assert stray == [TESTS / "conftest.py"]
