"""The class that runs the attention of a family in this process; a checkpoint's own code names it literally."""

from functools import cache

from sa_convert.families.family import Modules

_HERE = "Here"
"""Before the name of a class in shared_attention_special.py in that of ours."""


def attention_class_of(modules: Modules) -> type:
    """What comes before the attention class of a family whose modules these are."""
    return _class(modules.special_class)


@cache
def _class(name: str | None) -> type:
    from sa_convert.runtime import modeling_shared_attention as modeling
    from sa_convert.runtime import shared_attention_special as special
    from sa_convert.runtime.shared_attention_parts import PartedAttention
    from sa_convert.runtime.shared_attention_whole import WholeAttention

    bases = (WholeAttention, PartedAttention, modeling.TreatedAttention)
    first = () if name is None else (getattr(special, name),)
    return type(f"{_HERE}{name or ''}", (*first, *bases), {"__module__": __name__})


def __getattr__(name: str) -> type:
    """These classes by name, as pickle looks for them in another process."""
    if not name.startswith(_HERE):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _class(name.removeprefix(_HERE) or None)
