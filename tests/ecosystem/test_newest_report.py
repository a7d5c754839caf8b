"""What `make test` says of the newest transformers, and when that fails it."""

from subprocess import CompletedProcess

import pytest

from support import newest

LISTED = "WARNING: an index is ignored\ntransformers ({})\nAvailable versions: {}, 5.0.0\n"


@pytest.fixture
def look(monkeypatch, tmp_path):
    """`main` with commands that come out as told; returns its exit status, the report, and the Python of the tests."""

    def run(*, served, pinned="5.24.0", made=0, tests=0, chosen=None):
        asked = []

        def command(*words, **environment):
            text = " ".join(map(str, words))
            if "index versions" in text:
                return CompletedProcess(text, 0, LISTED.format(served, served) if served else "no answer")
            if text == "make newest-environment":
                return CompletedProcess(text, made, "what pip said")
            if "-c" in words:
                return CompletedProcess(text, 0, f"{chosen or served}\n")
            asked.append(environment["SA_CONVERT_NEWEST"])
            return CompletedProcess(text, tests, "what pytest said")

        monkeypatch.setattr(newest, "run", command)
        monkeypatch.setattr(newest, "version", lambda name: pinned)
        monkeypatch.setattr(newest, "ROOT", tmp_path)
        monkeypatch.setattr(newest, "REPORT", tmp_path / "build" / "newest.txt")
        return newest.main(), newest.REPORT.read_text(), asked

    return run


def test_a_newer_release_that_breaks_us_is_told_and_fails_nothing(look):
    status, report, asked = look(served="5.25.0", tests=1)
    assert status == 0
    assert "5.25.0, the newest release: BROKEN" in report
    assert "what pytest said" in report
    assert asked == [str(newest.PYTHON)]


def test_the_pinned_release_that_is_broken_fails(look):
    status, report, asked = look(served="5.24.0", tests=1)
    assert status == 1
    assert "5.24.0, the newest release and the pinned one: broken" in report
    assert asked == [newest.sys.executable]  # no other environment is made


@pytest.mark.parametrize("served", ["5.24.0", "5.25.0"])
def test_one_that_runs(look, served):
    status, report, asked = look(served=served)
    assert (status, len(asked)) == (0, 1)
    assert f"{served}, the newest release: runs what we make." in report


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"served": None}, "the registry does not answer"),
        ({"served": "5.25.0", "made": 2}, "its environment could not be made.\n\nwhat pip said"),
        ({"served": "5.25.0", "chosen": "5.23.0"}, "pip chooses 5.23.0"),
    ],
)
def test_what_cannot_be_tried_is_told_and_fails_nothing(look, options, said):
    status, report, asked = look(**options)
    assert (status, asked) == (0, [])
    assert "not tried" in report
    assert said in report
