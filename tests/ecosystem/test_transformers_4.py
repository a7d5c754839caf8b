"""The same converted folders load and generate the same tokens on transformers 4.57, where sa_convert is not installed.

`make test` makes the second environment and names its Python in SA_CONVERT_TRANSFORMERS_4.
"""

import os
import sys

import pytest

from sa_convert.families.table import FAMILIES
from support.elsewhere import difference, make_folders, make_job, run_elsewhere
from support.on_transformers import attempt
from support.processes import ROOT
from support.tiny_models import kinds_of

sys.path.append(str(ROOT / "docs"))
from generate import NOT_IN_4

# Base models for which 4.57's static cache itself raises, or generates other tokens than its dynamic cache does.
STATIC_FAILS_IN_4 = {"mvp", "trocr", "xglm"}
# One worker makes the folders and runs the other environment once.
pytestmark = pytest.mark.xdist_group("transformers-4")


def kinds(family):
    """The simplest and the most demanding kind of map."""
    return sorted({kinds_of(family)[0], kinds_of(family)[-1]})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Every family in two kinds of maps, as transformers 4 ran it."""
    python = os.environ.get("SA_CONVERT_TRANSFORMERS_4", str(ROOT / ".venv-transformers-4" / "bin" / "python"))
    assert os.path.exists(python), (
        f"{python} is missing; run `make test`, or name a Python in SA_CONVERT_TRANSFORMERS_4"
    )
    root = tmp_path_factory.mktemp("transformers-4")
    folders = make_folders(root, {family: kinds(family) for family in FAMILIES})
    result = run_elsewhere(python, make_job(folders.values()), root)
    assert result["transformers"].startswith("4.")
    return folders, result["found"]


@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, kind) for family in FAMILIES for kind in kinds(family)],
)
def test_same_tokens(results, family, kind):
    folders, found = results
    folder, base = folders[family, kind], folders[family, "base"]
    result = found[folder]
    if "absent" in result:
        assert family in NOT_IN_4, "docs/families.md says that this family runs on transformers 4.57"
        return
    assert family not in NOT_IN_4
    if FAMILIES[family].transformers_5:
        assert "need transformers 5, this is 4.57" in result["error"]
        assert result["refused"]
        return
    job = make_job([folder], ["cached"])
    here = attempt(folder, job)
    assert "error" not in here, here["error"]
    assert ("cached" in here) == (not FAMILIES[family].modules.bidirectional)
    assert difference(result, here, found[base], attempt(base, make_job([base], []))) is None
    if "cached" in here and result["static"] != here["cached"]:
        assert found[base]["static"] != found[base]["cached"], result["static"]
        assert family in STATIC_FAILS_IN_4
