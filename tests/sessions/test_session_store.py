"""A folder of sessions: what goes when it is full, and two processes at once."""

import os
import subprocess
import sys
import time

import pytest
import torch

from sa_convert.errors import SessionError
from sa_convert.sessions.session_store import SessionStore
from support.memory_models import some_ids
from support.processes import ROOT
from support.session_models import model_named, new_cache, read


@pytest.fixture(scope="module")
def filled():
    model, ids = model_named("base"), some_ids(20)
    cache = new_cache(model, "dynamic")
    read(model, cache, ids, [20])
    return cache, ids, model


def test_what_was_not_used_for_longest_goes(filled, tmp_path):
    size = SessionStore(tmp_path / "first", 10**9).put("a", *filled)
    store = SessionStore(tmp_path / "store", 3 * size + 100)
    for name in ("a", "b", "c"):
        store.put(name, *filled)
        time.sleep(0.02)
    assert [entry.name for entry in store.sessions()] == ["c", "b", "a"]
    session = store.get("a", filled[2])
    assert torch.equal(session.tokens, filled[1])
    time.sleep(0.02)
    assert [entry.name for entry in store.sessions()] == ["a", "c", "b"]
    store.put("d", *filled)
    assert [entry.name for entry in store.sessions()] == ["d", "a", "c"]
    assert store.get("b", filled[2]) is None
    entry = store.sessions()[0]
    assert (entry.bytes, entry.tokens) == (size, 20)
    assert store.remove("a")
    assert not store.remove("a")
    # What was removed is still there for those that have it.
    expected = read(filled[2], store.get("c", filled[2]).cache, filled[1], [3])
    assert torch.equal(read(filled[2], session.cache, filled[1], [3]), expected)


def test_refused(filled, tmp_path):
    store = SessionStore(tmp_path, 1000)
    with pytest.raises(SessionError, match="all sessions together may take 1000"):
        store.put("a", *filled)
    assert store.sessions() == []
    for name in ("", "../a", ".hidden", "a/b", "a" * 300):
        with pytest.raises(SessionError, match="is no name of a session"):
            store.get(name, filled[2])


def test_what_is_no_session_is_not_listed(filled, tmp_path):
    store = SessionStore(tmp_path, 10**9)
    (tmp_path / "notes.session").write_text("mine")
    store.put("a", *filled)
    assert [entry.name for entry in store.sessions()] == ["a"]
    assert (tmp_path / "notes.session").read_text() == "mine"


WRITER = """
import sys
from sa_convert.sessions.session_store import SessionStore
from support.memory_models import some_ids
from support.session_models import model_named, new_cache, read

model, ids = model_named("base"), some_ids(20)
cache = new_cache(model, "dynamic")
read(model, cache, ids, [20])
store = SessionStore(sys.argv[1], int(sys.argv[2]))
for turn in range(40):
    store.put(f"{sys.argv[3]}-{turn % 7}", cache, ids, model)
    store.get(f"{sys.argv[4]}-{turn % 7}", model)
"""


def test_two_processes(filled, tmp_path):
    """No one fails, and the folder is as small as it should be."""
    limit = 4 * SessionStore(tmp_path / "first", 10**9).put("a", *filled) + 100
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", WRITER, tmp_path / "store", str(limit)]
    children = [
        subprocess.Popen([*command, mine, other], env=environment, stderr=subprocess.PIPE)
        for mine, other in (("a", "b"), ("b", "a"))
    ]
    for child in children:
        _, error = child.communicate(timeout=300)
        assert child.returncode == 0, error
    store = SessionStore(tmp_path / "store", limit)
    assert len(store.sessions()) == 4
    assert sum(entry.bytes for entry in store.sessions()) <= limit
    assert sorted(os.listdir(tmp_path / "store")) == sorted([".lock", *(f"{e.name}.session" for e in store.sessions())])
