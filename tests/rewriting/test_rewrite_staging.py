"""The output appears at its destination complete or not at all, and nobody's files are lost."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from sa_convert.errors import OutputError
from sa_convert.output.staging import staging
from support.make_checkpoint import llama_config, llama_tensors, write_model


def earlier_output(folder, text="old"):
    folder.mkdir()
    (folder / "config.json").write_text('{"shared_attention": {"layers": {}}}')
    (folder / "report.json").write_text(text)
    return folder


def refused(destination, message, overwrite=False, needed=0, source=None):
    with pytest.raises(OutputError) as error, staging(destination, overwrite, needed, source):
        pytest.fail("the checks let it pass")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def names(folder):
    return sorted(os.listdir(folder))


def test_publishing(tmp_path):
    with staging(tmp_path / "out", False, 0) as stage:
        (stage.folder / "a").write_text("new")
        (stage.workspace / "scratch").write_text("x")
        assert stage.folder.stat().st_dev == tmp_path.stat().st_dev
        (hidden,) = names(tmp_path)
        assert hidden.startswith(".out.sa-convert-")
        stage.publish()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["a"]
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask


def test_every_stage_has_a_name_of_its_own(tmp_path):
    """Transformers keeps the code of local models by the last part of their path."""
    with staging(tmp_path / "out", False, 0) as one, staging(tmp_path / "out", False, 0) as two:
        assert one.folder.name != two.folder.name
        assert one.folder.exists()
        assert two.folder.exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OutputError])
def test_whatever_goes_wrong_nothing_stays(tmp_path, error):
    with pytest.raises(error), staging(tmp_path / "out", False, 0) as stage:  # noqa: PT012
        (stage.folder / "a").write_text("new")
        raise error
    assert names(tmp_path) == []


def test_a_stage_that_is_not_published_goes(tmp_path):
    with staging(tmp_path / "out", False, 0):
        pass
    assert names(tmp_path) == []


def test_existing_destinations(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "report.json").write_text("{}")
    earlier_output(tmp_path / "output")
    (tmp_path / "link").symlink_to(tmp_path / "output")
    for name in ("empty", "mine", "output"):
        refused(tmp_path / name, "exists already; use --overwrite or another -o")
    for overwrite in (False, True):
        refused(tmp_path / "file", "exists and is a file", overwrite)
        refused(tmp_path / "link", "exists and is a link", overwrite)
    refused(tmp_path / "mine", "holds files that sa-convert did not write", True)
    refused(tmp_path / "model", "holds files that sa-convert did not write", True)
    for name in ("empty", "output"):
        with staging(tmp_path / name, True, 0) as stage:
            (stage.folder / "a").write_text("new")
            assert names(tmp_path / name) in ([], ["config.json", "report.json"])
            stage.publish()
        assert names(tmp_path / name) == ["a"]
    assert names(tmp_path) == ["empty", "file", "link", "mine", "model", "output"]


def test_parents(tmp_path, monkeypatch):
    refused(tmp_path / "a" / "b", f"{tmp_path / 'a'}: there is no such folder to write 'b' into; make it first")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file" / "b", "is a file, so nothing can be written into it")
    refused(tmp_path.root, "is no place for an output folder")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused(tmp_path / "b", f"{tmp_path}: you may not write there")


def test_a_parent_that_turns_out_read_only(tmp_path, monkeypatch):
    from pathlib import Path

    def fail(self, *arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", fail)
    refused(tmp_path / "b", f"{tmp_path}: cannot be written to: Read-only file system")


def test_source_and_destination_stay_apart(tmp_path, monkeypatch):
    source = earlier_output(tmp_path / "model")
    monkeypatch.chdir(source)
    for given in (source, "../model", "."):
        refused(tmp_path / "model", "is the model itself", True, source=type(source)(given))
    refused(source / "out", "lies in the folder of the model", source=source)
    (source / "inner").mkdir()
    refused(source, "holds the model", True, source=source / "inner")
    (tmp_path / "link").symlink_to(source)
    refused(tmp_path / "link" / "out", "lies in the folder of the model", source=source)
    (source / "x.gguf").write_text("x")
    refused(source, "holds the model", True, source=source / "x.gguf")
    with staging(source / "beside-the-file", False, 0, source / "x.gguf"):
        pass


def test_no_disk_space_is_found_before_the_first_byte(tmp_path):
    refused(tmp_path / "out", " of disk space, but ", needed=2**62)
    refused(tmp_path / "out", "needs 4611.7 PB of disk space", needed=2**62)
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_gets_full_in_the_middle(tmp_path, number):
    with pytest.raises(OutputError, match=r"out: cannot be written: .*nothing was left there"), staging(
        tmp_path / "out", False, 0
    ):  # fmt: skip
        raise OSError(number, os.strerror(number))
    assert names(tmp_path) == []


def test_other_errors_of_the_system_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), staging(tmp_path / "out", False, 0):
        (tmp_path / "absent").read_text()


def test_the_earlier_output_comes_back_when_the_swap_fails(tmp_path):
    earlier_output(tmp_path / "out")
    match = "cannot be moved there"
    with pytest.raises(OutputError, match=match), staging(tmp_path / "out", True, 0) as stage:  # noqa: PT012
        shutil.rmtree(stage.folder)
        stage.publish()
    assert (tmp_path / "out" / "report.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_something_that_appears_at_the_destination_meanwhile_is_kept(tmp_path):
    with pytest.raises(OutputError, match="exists already"), staging(tmp_path / "out", False, 0) as stage:  # noqa: PT012
        earlier_output(tmp_path / "out")
        stage.publish()
    assert (tmp_path / "out" / "report.json").read_text() == "old"


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_that_publish_at_once_take_turns(tmp_path, overwrite):
    """What the first has put in place while the second waits is seen by the second, which replaces it only if asked."""
    turn = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(turn, fcntl.LOCK_EX)
    done = []

    def publish():
        try:
            with staging(tmp_path / "out", overwrite, 0) as stage:
                (stage.folder / "report.json").write_text("second")
                waits.set()
                stage.publish()
            done.append("published")
        except OutputError as error:
            done.append(str(error))

    waits = threading.Event()
    second = threading.Thread(target=publish)
    second.start()
    assert waits.wait(60)
    time.sleep(0.2)
    assert not done
    assert not (tmp_path / "out").exists()
    earlier_output(tmp_path / "out", "first")
    os.close(turn)
    second.join(60)
    assert (tmp_path / "out" / "report.json").read_text() == ("second" if overwrite else "first")
    assert "published" in done[0] if overwrite else "exists already" in done[0]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("odd", [1, "sa_convert", ["sa_convert"], None])
def test_a_folder_with_odd_versions_is_not_taken_for_an_analysis(tmp_path, odd):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.yaml").write_text("")
    (tmp_path / "out" / "analysis.json").write_text(json.dumps({"versions": odd}))
    refused(tmp_path / "out", "holds files that sa-convert did not write", True)


@pytest.mark.parametrize("file", ["config.json", "analysis.json"])
def test_a_pipe_at_the_destination_is_not_waited_for(tmp_path, file):
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / file)
    refused(tmp_path / "out", "holds files that sa-convert did not write", True)


def test_leftovers_go_but_not_those_of_living_processes_or_of_others(tmp_path):
    (tmp_path / ".out.sa-convert-0000abcd" / "staged").mkdir(parents=True)
    strangers = [
        ".out.sa-convert-notours",
        ".other.sa-convert-0000abcd",
        "out.sa-convert-0000abcd",
        ".out.sa-convert-x.sa-convert-0000abcd",
    ]
    for name in strangers:
        (tmp_path / name).mkdir()
    with staging(tmp_path / "out", False, 0) as living:
        with staging(tmp_path / "out", False, 0):
            assert living.folder.exists()
        assert not (tmp_path / ".out.sa-convert-0000abcd").exists()
    assert names(tmp_path) == sorted(strangers)


def test_a_run_killed_in_the_middle_of_the_swap_loses_no_earlier_output(tmp_path):
    aside = tmp_path / ".out.sa-convert-0000abcd" / "put_aside"
    aside.parent.mkdir()
    earlier_output(aside)
    refused(tmp_path / "out", "exists already")
    assert (tmp_path / "out" / "report.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


CONVERT = """
import sys, time
from pathlib import Path
from sa_convert.domain.plan import Plan
from sa_convert.families.table import FAMILIES
from sa_convert.read.folder import open_folder
from sa_convert.rewrite import shards
from sa_convert.rewrite.ranges import copy_range
from sa_convert.rewrite.rewrite import needed_bytes, rewrite_checkpoint
from sa_convert.output.staging import staging
if len(sys.argv) > 3:
    def slowly(source, start, stop, target, position, advance):
        copy_range(source, start, stop, target, position, lambda count: (advance(count), time.sleep(0.1)))
        print("copied", flush=True)
    shards.copy_range = slowly
base = open_folder(Path(sys.argv[1]))
with staging(Path(sys.argv[2]), True, needed_bytes(base, {}), base.folder) as stage:
    rewrite_checkpoint(base, FAMILIES["llama"], Plan(), {}, stage.folder, runtimes={})
    (stage.folder / "report.json").write_text("{}")
    stage.publish()
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    config = llama_config(8, 512, 8, 8, 2048, 4000)
    return write_model(tmp_path_factory.mktemp("large") / "model", config, llama_tensors(config), 8)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_run_ended_in_the_middle_leaves_nothing_and_a_rerun_succeeds(tmp_path, large, number, earlier):
    out = tmp_path / "out"
    if earlier:
        earlier_output(out)
    command = [sys.executable, "-c", CONVERT, str(large), str(out)]
    child = subprocess.Popen([*command, "slowly"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.readline()
    assert any(name.startswith(".out.sa-convert-") for name in names(tmp_path))
    child.send_signal(number)
    child.communicate(timeout=60)
    assert child.returncode != 0
    if earlier:
        assert (out / "report.json").read_text() == "old"
    else:
        assert not out.exists()
    if number != signal.SIGKILL:
        assert names(tmp_path) == ["out"] * earlier
    subprocess.run(command, check=True, capture_output=True)
    assert names(tmp_path) == ["out"]
    assert json.loads((out / "config.json").read_text())["model_type"] == "shared_attention_llama"
    for file in large.glob("*.safetensors"):
        assert (out / file.name).stat().st_size == file.stat().st_size


FREED = """
import os, signal, sys, time
from sa_convert.output.signals import termination_as_exit

class Freed:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        sum(range(100))  # Python hears of the signal here, and drops what the handler raises

with termination_as_exit():
    try:
        Freed()
        print("went on", flush=True)
        time.sleep(30)
        print("went on to the end", flush=True)
    finally:
        print("cleaned", flush=True)
print("ended as if nothing had been")
"""


def test_a_signal_while_an_object_is_freed_is_not_lost():
    start = time.monotonic()
    child = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True)
    assert child.stdout == "went on\ncleaned\n"
    assert child.stderr == ""  # Python would print the traceback of what it drops
    assert child.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - start < 20


def test_two_interrupts_do_not_stop_the_cleaning(tmp_path, large):
    command = [sys.executable, "-c", CONVERT, str(large), str(tmp_path / "out"), "slowly"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.readline()
    for _ in range(20):
        child.send_signal(signal.SIGTERM)
        time.sleep(0.005)
    child.communicate(timeout=60)
    assert names(tmp_path) == []


def test_a_file_size_limit_in_the_middle_is_one_clear_error(tmp_path, large):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))\n"
    command = [sys.executable, "-c", limit + CONVERT, str(large), str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert "OutputError" in run.stderr.splitlines()[-1]
    assert "a file is larger than this system allows; nothing was left there" in run.stderr.splitlines()[-1]
    assert names(tmp_path) == []


def test_a_small_disk(tmp_path, large):
    """A real file system that is full in the middle, the check before it having been passed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        command = [sys.executable, "-c", CONVERT, str(large), str(disk / "out")]
        early = subprocess.run(command, capture_output=True, text=True)
        assert "of disk space, but" in early.stderr.splitlines()[-1]
        blind = CONVERT.replace("needed_bytes(base, {})", "0")
        late = subprocess.run([sys.executable, "-c", blind, *command[3:]], capture_output=True, text=True)
        assert "cannot be written: the disk is full; nothing was left there" in late.stderr.splitlines()[-1]
        assert names(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)
