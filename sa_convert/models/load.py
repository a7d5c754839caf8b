"""Loads the two models that validation compares, each as its users will."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from sa_convert.errors import CheckpointError, DataError
from sa_convert.families.family import PREFIX
from sa_convert.families.model_classes import MAPPINGS
from sa_convert.models.auto_class import auto_class_name, headless, prediction_task
from sa_convert.models.placement import NO_MEMORY, Placement
from sa_convert.models.quiet import keep_module_cache_clean, quiet
from sa_convert.models.trust import is_trusted
from sa_convert.read.folder import read_config

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode. unexpected: names of tensors in its files that it has no use for."""

    model: Any
    unexpected: frozenset[str]


@contextmanager
def load_base(folder: Path, placement: Placement, trust_remote_code: bool = False) -> Iterator[Loaded]:
    """The base model, for as long as the context lasts. Code in its folder is not run, unless it is trusted.

    Raises CheckpointError if transformers cannot load it, or finds that tensors are missing or of another shape, and
    DataError if it has no language-modelling head.
    """
    keep_module_cache_clean()
    import transformers

    who = f"The model in {folder}"
    config = read_config(folder)
    prediction_task(config, who)
    auto_class = getattr(transformers, auto_class_name(config))
    options = {"trust_remote_code": trust_remote_code}
    with _loaded(auto_class, folder, placement, who, options) as (loaded, info):
        _refuse_incomplete(who, info, ("missing_keys", "mismatched_keys", "error_msgs"))
        yield loaded


@contextmanager
def load_converted(
    folder: Path,
    placement: Placement,
    unexpected: frozenset[str] | None = frozenset(),
    who: str = "The converted model",
) -> Iterator[Loaded]:
    """The converted model, by the code in its own folder, for as long as the context lasts; one that carries none, as
    it was written for an engine, by a class of transformers.

    unexpected: names of tensors that the base model does not know either; None: superfluous tensors are no fault, since
    the base model is not known. who: what messages call it. Raises CheckpointError if it cannot be loaded, or a
    tensor is missing, superfluous or of another shape, and DataError if it has no language-modelling head.
    """
    keep_module_cache_clean()
    told = read_config(folder)
    prediction_task(told, who)
    if not str(told.get("model_type")).startswith(PREFIX):
        import transformers

        auto_class, options = getattr(transformers, auto_class_name(told)), {"trust_remote_code": False}
        with _loaded(auto_class, folder, placement, who, options) as (loaded, info):
            _refuse_faulty(who, loaded, info, unexpected)
            yield loaded
        return
    with quiet():
        config = _remote_config(folder, who)
    options = {"config": config, "trust_remote_code": True}
    with _loaded(_model_class(config, folder, who), folder, placement, who, options) as (loaded, info):
        if not type(loaded.model).__module__.startswith("transformers_modules."):
            ran = type(loaded.model).__module__
            raise CheckpointError(f"{who}: transformers ran {ran} instead of the code in its folder.")
        _refuse_faulty(who, loaded, info, unexpected)
        yield loaded


def _refuse_faulty(who: str, loaded: Loaded, info: dict[str, Any], unexpected: frozenset[str] | None) -> None:
    """Raises CheckpointError. unexpected: as in `load_converted`."""
    info["unexpected_keys"] = loaded.unexpected - unexpected if unexpected is not None else ()
    _refuse_incomplete(who, info, ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


def load_tokenizer(folder: Path, converted: bool = False, otherwise: str = ", or use --no-validate") -> Any:
    """The tokenizer in a folder. Raises DataError if there is none.

    converted: the folder's own code is trusted, as for its model; transformers would ask for that on the terminal. That
    of other folders is if `sa_convert.models.trust` says so.
    otherwise: what else the message says that the user can do.
    """
    keep_module_cache_clean()
    from transformers import AutoConfig, AutoTokenizer

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": converted}
    with quiet():
        try:
            if not converted and is_trusted(folder):  # its tokenizer is; its configuration is that of transformers
                options["config"] = AutoConfig.from_pretrained(folder, **options)
                options["trust_remote_code"] = True
            return AutoTokenizer.from_pretrained(folder, **options)
        except Exception as error:  # OSError, ValueError, KeyError, ... by family and by what is missing
            raise DataError(
                f"{folder}: no tokenizer that can be loaded, so perplexity cannot be measured: add the "
                f"model's tokenizer files (tokenizer.json, tokenizer_config.json){otherwise}. "
                f"({first_line(error)})"
            ) from error


def first_line(error: Exception) -> str:
    """The first line of a library's message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def refuse_foreign_tokens(
    folder: Path, embeddings: int, tokens: "torch.Tensor", inserted: tuple[int, ...] = ()
) -> None:
    """Raises CheckpointError for tokens, or such as a task inserts, that a model with so many embeddings does not
    have."""
    if (largest := max(int(tokens.max()), *inserted, 0)) >= embeddings:
        raise CheckpointError(
            f"{folder}: the tokenizer makes token {largest}, but the model has embeddings of {embeddings} tokens "
            "only: the tokenizer is another model's."
        )


def embedded_tokens(model: Any) -> int:
    """How many tokens a model has embeddings of."""
    return int(model.get_input_embeddings().weight.shape[0])


def release_memory() -> None:
    """Give the memory of a model that nothing refers to any more back before the next is loaded."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _loaded(
    auto_class: Any, folder: Path, placement: Placement, who: str, options: dict[str, Any]
) -> Iterator[tuple[Loaded, dict[str, Any]]]:
    with TemporaryDirectory(prefix="sa-convert-offload-") as offload, quiet():
        options = {**options, "dtype": placement.dtype, "local_files_only": True, "output_loading_info": True}
        if placement.max_memory is None:
            options["device_map"] = {"": placement.device}
        else:
            # "auto" fails for some models with tied weights, and is not needed if everything goes to the disk.
            bounds = dict(placement.max_memory)
            options |= (
                {"device_map": {"": "disk"}} if bounds == NO_MEMORY else {"device_map": "auto", "max_memory": bounds}
            )
            options["offload_folder"] = offload
        try:
            model, info = auto_class.from_pretrained(folder, **options)
        except Exception as error:  # whatever a library finds wrong with the files is the user's to read
            raise CheckpointError(f"{who} cannot be loaded by transformers: {first_line(error)}") from error
        if model.get_output_embeddings() is None:
            raise headless(who, type(model).__name__)
        yield Loaded(model.eval(), frozenset(info["unexpected_keys"])), info


def _remote_config(folder: Path, who: str) -> Any:
    """The configuration by the code in the folder, even if sa_convert's own classes are registered."""
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
        if type(config).__module__.startswith("transformers_modules."):
            return config
        config_class: Any = get_class_from_dynamic_module(config.auto_map["AutoConfig"], folder)
        return config_class.from_pretrained(folder)
    except Exception as error:
        raise CheckpointError(f"{who}: its configuration cannot be loaded: {first_line(error)}") from error


def _model_class(config: Any, folder: Path, who: str) -> Any:
    """The auto class that the folder names, or the model class of the folder's code if a folder with the same
    configuration code was loaded before: the auto class would use the modeling code of that one."""
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    name = auto_class_name(read_config(folder))
    if type(config) not in getattr(transformers, MAPPINGS[name]):
        return getattr(transformers, name)
    try:
        return get_class_from_dynamic_module(config.auto_map[name], folder)
    except Exception as error:
        raise CheckpointError(f"{who}: its code cannot be loaded: {first_line(error)}") from error


def _refuse_incomplete(who: str, info: dict[str, Any], kinds: tuple[str, ...]) -> None:
    for kind in kinds:
        if tensors := info.get(kind):
            names = sorted(str(name) for name in tensors)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(f"{who} has {kind.replace('_', ' ')}: {', '.join(names[:3])}{more}.")
