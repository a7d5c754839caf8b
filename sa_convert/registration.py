"""Makes transformers know the shared-attention types once sa_convert is imported, without importing transformers here.

`import sa_convert` must stay light (`sa-convert --help`, header-only work), so where transformers is not loaded yet, the
classes are registered right after it loads its Auto classes. Registration is transformers' own: AutoConfig.register
and AutoModelForCausalLM.register.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_configs() -> None:
    """Register every family with AutoConfig."""
    from transformers import AutoConfig

    from sa_convert.export.configuration_shared_attention import config_class_of

    for family in _families():
        config_class = config_class_of(family)
        # So that save_pretrained writes the code files beside the weights, as it does for remote code.
        config_class.register_for_auto_class()
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def register_models() -> None:
    """Register every family with AutoModelForCausalLM."""
    from transformers import AutoModelForCausalLM

    from sa_convert.export.modeling_shared_attention import model_class_of

    for family in _families():
        model_class = model_class_of(family)
        model_class.register_for_auto_class("AutoModelForCausalLM")
        AutoModelForCausalLM.register(model_class.config_class, model_class, exist_ok=True)


def _families() -> Iterator:
    """The families that this transformers has."""
    import transformers

    from sa_convert.export.shared_attention_families import FAMILIES

    return (family for family in FAMILIES.values() if hasattr(transformers, family.causal_lm))


_AFTER: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": register_configs,
    "transformers.models.auto.modeling_auto": register_models,
}


class _RegisterAfterLoading(importlib.abc.MetaPathFinder):
    """Finds one module as Python does, and registers our classes when it has been loaded."""

    def __init__(self, module: str, register: Callable[[], None]) -> None:
        self._module = module
        self._register = register

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            self._register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_when_loaded() -> None:
    """Register now what transformers has loaded, and the rest as soon as it loads it."""
    for module, register in _AFTER.items():
        if module in sys.modules:
            register()
        else:
            sys.meta_path.insert(0, _RegisterAfterLoading(module, register))


def cancel() -> None:
    """Do not register. The command line validates a checkpoint by the code inside of its folder, not by ours."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _RegisterAfterLoading)]
