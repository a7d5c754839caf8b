"""Files of sessions: whose they are, what is refused, in one sentence each, and that nothing else is lost."""

import copy
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from sa_convert.errors import OutputError, SessionError
from sa_convert.sessions.identity import identity_of
from sa_convert.sessions.loading import OtherRelease, load, told_in
from sa_convert.sessions.saving import save, save_later
from support.memory_models import made, some_ids
from support.processes import ROOT
from support.session_models import model_named, new_cache, read

LENGTH = 20


@pytest.fixture
def session(tmp_path):
    """A file, and the model that filled it."""
    model, ids = model_named("some windows"), some_ids(LENGTH)
    cache = new_cache(model, "dynamic")
    read(model, cache, ids, [LENGTH])
    save(cache, ids, tmp_path / "session", model, notes={"of": "me"})
    return tmp_path / "session", model


def changed_header(file, **changes):
    """The same file with other metadata; None takes a key away."""
    with safe_open(file, framework="pt") as opened:
        metadata = {key: value for key, value in {**opened.metadata(), **changes}.items() if value is not None}
    save_file(load_file(file), file, metadata)


def test_any_reader_of_safetensors_reads_it(session):
    file, model = session
    with safe_open(file, framework="pt") as opened:
        metadata, names = opened.metadata(), set(opened.keys())
    assert metadata["model"] == identity_of(model).model
    assert len(metadata["plan"]) == 64
    assert (metadata["dtype"], metadata["length"], metadata["revision"]) == ("float32", str(LENGTH), "")
    assert json.loads(metadata["notes"]) == {"of": "me"}
    assert {"tokens", "1.keys", "1.values"} <= names
    tokens, notes = told_in(file)
    assert torch.equal(tokens, some_ids(LENGTH))
    assert notes == {"of": "me"}


def test_another_model_is_refused(session):
    file, model = session
    other = copy.deepcopy(model)
    load(file, other)
    other.get_output_embeddings().weight.data += 1e-3
    with pytest.raises(SessionError, match=r"filled by another model, or one with other weights: give the model"):
        load(file, other)


def test_another_plan_is_refused(session):
    """Windows leave every weight as it is."""
    file, _ = session
    with pytest.raises(SessionError, match=r"by one converted by plan \w{8}, and this one is one converted by plan"):
        load(file, model_named("windows"))
    with pytest.raises(SessionError, match=r"by one converted by plan \w{8}, and this one is a base model"):
        load(file, made("llama", share=False))


def test_another_dtype_is_refused(session):
    file, model = session
    with pytest.raises(SessionError, match=r"filled by a model in float32, and this one computes in bfloat16"):
        load(file, copy.deepcopy(model).to(torch.bfloat16))


def test_another_release_is_refused_and_what_was_said_is_there(session):
    file, model = session
    changed_header(file, transformers="4.9.0")
    with pytest.raises(OtherRelease, match=r"one of transformers 4\.9\.0, and this is"):
        load(file, model)
    assert told_in(file)[0].shape == (2, LENGTH)


def test_another_place_is_not_another_model(tmp_path):
    """Identity is in the weights, not in a name."""
    first, second = made("llama", share=False), made("llama", share=False)
    first.config._name_or_path = "/somewhere/else"
    assert identity_of(first) == identity_of(second)
    assert identity_of(first) != identity_of(made("llama", share=False, seed=1))
    assert identity_of(first) != identity_of(made("llama", share=False, rms_norm_eps=1e-3))


@pytest.mark.parametrize("part", [0, 4, 100, 3000, -1])
def test_a_cut_file_is_refused(session, part):
    file, model = session
    content = file.read_bytes()
    file.write_bytes(content[:part])
    with pytest.raises(SessionError, match=r"cut short"):
        load(file, model)


@pytest.mark.parametrize(
    "change",
    [
        {"format": None},
        {"format": "sa-convert session 9"},
        {"layers": "[]"},
        {"layers": "nonsense"},
        {"layers": json.dumps([{"class": "DynamicLayer", "kind": "plain", "state": {"keys": {"tensor": "9"}}}] * 6)},
        {
            "layers": json.dumps(
                [{"class": "DynamicLayer", "kind": "plain", "state": {"keys": {"object": "Popen", "state": {}}}}] * 6
            )
        },
        {"layers": json.dumps([{"class": "DynamicLayer", "kind": "os.system", "state": {}}] * 6)},
        {"dtype": None},
        {"length": "many"},
    ],
    ids=str,
)
def test_damaged_and_hostile_headers_are_refused(session, change):
    file, model = session
    changed_header(file, **change)
    with pytest.raises(SessionError) as error:
        load(file, model)
    assert "\n" not in str(error.value)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 64, b"\x10" + b"\0" * 7 + b'{"a":[1,2,3,4]}'])
def test_what_is_no_session_is_refused(tmp_path, content):
    file, model = tmp_path / "notes.txt", model_named("some windows")
    with pytest.raises(SessionError, match="cannot be read: No such file"):
        load(file, model)
    file.write_bytes(content)
    with pytest.raises(SessionError, match="is no session"):
        load(file, model)


def test_a_file_that_is_no_session_is_not_overwritten(session, tmp_path):
    _, model = session
    cache, ids = new_cache(model, "dynamic"), some_ids(LENGTH)
    read(model, cache, ids, [LENGTH])
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    for taken in (notes, tmp_path):
        with pytest.raises(SessionError, match="is there already and no whole session"):
            save(cache, ids, taken, model)
    assert notes.read_text() == "mine"
    with pytest.raises(OutputError, match="cannot be written: No such file"):
        save(cache, ids, tmp_path / "nowhere" / "session", model)
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "session"]


def test_what_no_session_keeps(tmp_path):
    model, ids = model_named("base"), some_ids(LENGTH)
    with pytest.raises(SessionError, match="use a dynamic or a static cache"):
        save((), ids, tmp_path / "session", model)
    cache = new_cache(model, "dynamic")
    read(model, cache, ids, [LENGTH])
    with pytest.raises(SessionError, match="give all that the model has read"):
        save(cache, ids[:, :5], tmp_path / "session", model)
    assert not os.listdir(tmp_path)


def test_quantised_caches_are_refused(tmp_path):
    from transformers.cache_utils import Cache, QuantizedLayer

    class Grouped(QuantizedLayer):
        def _quantize(self, tensor, axis):
            return tensor

        def _dequantize(self, quantized):
            return quantized

    Grouped.__name__ = "GroupedQuantizedLayer"
    model, ids = model_named("base"), some_ids(LENGTH)
    cache = Cache(layers=[Grouped(residual_length=3) for _ in range(model.config.num_hidden_layers)])
    read(model, cache, ids, [LENGTH])
    with pytest.raises(SessionError, match="Layer 0 of the cache is quantised"):
        save(cache, ids, tmp_path / "session", model)


def test_it_is_written_while_something_else_is_done(tmp_path, monkeypatch):
    """Nothing is at the file before the last byte of the new one is."""
    from sa_convert.sessions import session_file

    model, ids, file = model_named("base"), some_ids(LENGTH), tmp_path / "session"
    cache = new_cache(model, "dynamic")
    read(model, cache, ids, [LENGTH])
    seen, replace = [], os.replace

    def slow(source, target):
        time.sleep(0.2)
        seen.append((os.path.exists(target), os.path.getsize(source)))
        replace(source, target)

    monkeypatch.setattr(session_file.os, "replace", slow)
    saving = save_later(cache, ids, file, model)
    assert not file.exists()
    size = saving.wait()
    assert seen == [(False, size)]
    assert os.listdir(tmp_path) == ["session"]
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_full_disk_leaves_the_earlier_session(session, monkeypatch):
    import errno

    from sa_convert.sessions import session_file

    file, model = session
    before, cache, ids = file.read_bytes(), new_cache(model, "dynamic"), some_ids(LENGTH)
    read(model, cache, ids, [LENGTH])

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(session_file.os, "fsync", full)
    with pytest.raises(OutputError, match="the disk is full"):
        save(cache, ids, file, model)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == ["session"]


WRITER = """
import sys
import torch
from transformers import DynamicCache
from sa_convert.sessions.saving import save
from support.session_models import model_named, new_cache, read
from support.memory_models import some_ids

model, file = model_named("some windows"), sys.argv[1]
cache, ids = new_cache(model, "dynamic"), some_ids(400)
read(model, cache, ids, [400])
print("ready", flush=True)
for turn in range(10**6):
    save(cache, ids, file, model, notes={"turn": turn})
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_kills_leave_the_old_session_or_the_new_one(tmp_path, number):
    """`python docs/benchmarks/session_kills.py` does it a hundred times."""
    file, model = tmp_path / "session", model_named("some windows")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    turns = []
    for wait in (0.05, 0.11, 0.17):
        child = subprocess.Popen([sys.executable, "-c", WRITER, file], stdout=subprocess.PIPE, env=environment)
        assert child.stdout.readline() == b"ready\n"
        time.sleep(wait)
        child.send_signal(number)
        child.wait()
        turns.append(load(file, model).notes["turn"])
    cache, ids = new_cache(model, "dynamic"), some_ids(LENGTH)
    read(model, cache, ids, [LENGTH])
    save(cache, ids, file, model)  # what the killed ones left goes
    assert os.listdir(tmp_path) == ["session"]
    assert all(turn >= 0 for turn in turns)


def test_two_writers_leave_a_whole_session(tmp_path):
    model, ids, file = model_named("base"), some_ids(LENGTH), tmp_path / "session"
    caches = []
    for _ in range(2):
        cache = DynamicCache(config=model.config)
        read(model, cache, ids, [LENGTH])
        caches.append(cache)
    for _ in range(20):
        savings = [save_later(cache, ids, file, model, notes={"who": who}) for who, cache in enumerate(caches)]
        for saving in savings:
            saving.wait()
        assert load(file, model).notes["who"] in (0, 1)
    assert os.listdir(tmp_path) == ["session"]
