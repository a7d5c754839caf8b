"""What a model's forward calls its arguments, which releases of transformers rename: read off, never written down."""

from collections.abc import Iterator, Mapping
from inspect import signature
from typing import Any

from sa_convert.errors import SaConvertError

_LAST = "logits_to_keep"


def cache_keyword(model: Any) -> str:
    """The name under which the model's forward takes a cache: that of the parameter that is declared as one.

    Code that declares no types is asked for a name that ever was in use; a forward that hands on whatever it is given,
    for that of the class that it derives from. Raises SaConvertError if none takes a cache.
    """
    inherited = [vars(cls)["forward"] for cls in type(model).__mro__ if "forward" in vars(cls)]
    for forward in (model.forward, *inherited):
        parameters = signature(forward).parameters
        declared = [name for name, parameter in parameters.items() if "Cache" in str(parameter.annotation)]
        for name in (*declared, *(known for known in ("cache", "past_key_values") if known in parameters)):
            return name
    raise SaConvertError(f"{type(model).__name__} takes no cache: no argument of its forward is declared as one.")


def last_logits_only(model: Any, number: int = 1) -> dict[str, Any]:
    """Arguments with which the model computes logits for the last tokens alone, if it knows such an argument: then its
    logits are of so many positions, and otherwise of all."""
    inherited = [vars(cls)["forward"] for cls in type(model).__mro__ if "forward" in vars(cls)]
    known = any(_LAST in signature(forward).parameters for forward in inherited)
    return {_LAST: number} if known else {}


def cache_of(output: Any) -> Any:
    """The cache in a model's output, whatever it is called there; None if the output has none (RecurrentGemma's)."""
    return next((value for value in output.values() if _is_cache(value)), None)


def dynamic_cache(model: Any) -> Any:
    """A new one, for a model whose output does not name the cache that it makes itself."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config(decoder=True))


def caches_in(cache: Any) -> Iterator[Any]:
    """The caches that an encoder-decoder's consists of, or the cache itself."""
    parts = [value for value in getattr(cache, "__dict__", {}).values() if _is_cache(value)]
    for part in parts:
        yield from caches_in(part)
    if not parts:
        yield cache


def first_argument(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, str | None]:
    """What a hook finds as the first argument of the module's forward, and the keyword that it came under, or None."""
    if args:
        return args[0], None
    name = next(name for name in signature(module.forward).parameters if name != "self")
    return kwargs[name], name


def _is_cache(value: Any) -> bool:
    """Most are Cache; some models of transformers 5.0 have one of a class of their own."""
    return hasattr(value, "get_seq_length") and not isinstance(value, type)
