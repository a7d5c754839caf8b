"""Makes transformers know the shared-attention types once sa_convert is imported, without importing transformers here.

`import sa_convert` must stay light (`sa-convert --help`, header-only work), so if transformers is not loaded yet,
the types are registered right after it is. Registration is transformers' own: AutoConfig.register
and the auto classes' register.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class _RegisterAfterLoading(importlib.abc.MetaPathFinder):
    """Finds transformers as Python does, and registers our classes when it has been loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "transformers":
            return None
        cancel()
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_when_loaded() -> None:
    """Register now if transformers is loaded, else as soon as it is."""
    if "transformers" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _RegisterAfterLoading())


def cancel() -> None:
    """Do not register. The command line validates a checkpoint by the code inside of its folder, not by ours."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _RegisterAfterLoading)]


def _register() -> None:
    from sa_convert.treated_classes import register

    register()
