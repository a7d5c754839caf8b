"""Makes transformers know the shared-attention types once sa_convert is imported, without importing transformers here.

`import sa_convert` must stay light (`sa-convert --help`, header-only work), so where transformers is not loaded yet,
the types are registered right after it is. Registration is transformers' own: AutoConfig.register
and the auto classes' register.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from sa_convert.export.shared_attention_families import FAMILIES, HEADS, Family, auto_classes_of


class _LazyModelClass:
    """Stands for a model class and makes it when it is used, so that registration does not import every model."""

    def __init__(self, family: Family, architecture: str, auto_class: str, config_class: Any) -> None:
        self.config_class = config_class
        self._family, self._architecture, self._auto_class = family, architecture, auto_class

    def __getattr__(self, name: str) -> Any:
        from sa_convert.export.modeling_shared_attention import model_class_of

        model_class: Any = model_class_of(self._family, self._architecture)
        # So that save_pretrained writes the code files beside the weights, as it does for remote code.
        model_class.register_for_auto_class(self._auto_class)
        return getattr(model_class, name)


def register() -> None:
    """Register every family that this transformers has with AutoConfig, and its classes with their auto classes."""
    import transformers

    from sa_convert.export.configuration_shared_attention import config_class_of

    known = set(dir(transformers))
    for family in FAMILIES.values():
        if family.config_class not in known:
            continue
        config_class: Any = config_class_of(family)
        config_class.register_for_auto_class()
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for head in HEADS:
            architecture = f"{family.class_prefix}{head}"
            for auto_class in auto_classes_of(family, architecture) if architecture in known else ():
                lazy: Any = _LazyModelClass(family, architecture, auto_class, config_class)
                getattr(transformers, auto_class).register(config_class, lazy, exist_ok=True)


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
            register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_when_loaded() -> None:
    """Register now if transformers is loaded, else as soon as it is."""
    if "transformers" in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _RegisterAfterLoading())


def cancel() -> None:
    """Do not register. The command line validates a checkpoint by the code inside of its folder, not by ours."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _RegisterAfterLoading)]
