"""Keeps libraries from writing over our output, and our visits out of the user's caches."""

import atexit
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of transformers, accelerate and torch, and their progress bars only on a terminal, since large models
    take long to load. Their settings come back."""
    import transformers

    settings = transformers.utils.logging
    verbosity, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    accelerate = logging.getLogger("accelerate")
    level = accelerate.level
    settings.set_verbosity_error()
    if not sys.stderr.isatty():
        settings.disable_progress_bar()
    accelerate.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        settings.set_verbosity(verbosity)
        accelerate.setLevel(level)
        if bars:
            settings.enable_progress_bar()


def keep_module_cache_clean() -> None:
    """Let transformers copy remote code to a temporary folder that goes when the process ends, instead of the user's
    ~/.cache/huggingface/modules. transformers reads that setting when it is imported: later calls change nothing."""
    if "transformers" in sys.modules:
        return
    folder = tempfile.mkdtemp(prefix="sa-convert-modules-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    before = os.environ.get("HF_MODULES_CACHE")
    os.environ["HF_MODULES_CACHE"] = folder
    try:
        import transformers.utils.hub  # noqa: F401
    finally:
        if before is None:
            del os.environ["HF_MODULES_CACHE"]
        else:
            os.environ["HF_MODULES_CACHE"] = before
