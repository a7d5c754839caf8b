"""What every test may use: an environment that leaves no trace, a small base model, and a recipe."""

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

# Before transformers is imported: no network, and code of converted folders is cached for this run only.
_modules = tempfile.TemporaryDirectory(prefix="sa-convert-tests-")
os.environ.update(
    HF_HUB_OFFLINE="1", HF_MODULES_CACHE=_modules.name, TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error"
)
# Tiny models gain nothing from more threads, and tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Run in the background or under nohup, these signals are ignored, by the processes that tests interrupt, too.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

import sa_convert.registration  # noqa: E402
from support.cli_cases import SPAN  # noqa: E402
from support.processes import run_cli  # noqa: E402
from support.tiny_models import save_tiny, save_tokenizer, write_recipe  # noqa: E402

# Tests load converted folders by the code inside of them, as users do.
sa_convert.registration.cancel()


@pytest.fixture(scope="session")
def cli():
    return run_cli


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    save_tiny("llama", folder)
    save_tokenizer(folder)
    (folder / "LICENSE").write_text("the licence")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def model(base, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(base, tmp_path / "model"))


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path / "span.json", SPAN, gate={"max_perplexity_increase": "60%"})


def pytest_collection_modifyitems(items):
    """Tests that one worker runs together, minutes on end, come first, so that the others fill the second worker."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)
