"""The class that runs the attention of a family in this process; a checkpoint's own code names it literally."""

import sys
from functools import cache

from sa_convert.families.family import Modules


def attention_class_of(modules: Modules) -> type:
    """What comes before the attention class of a family whose modules these are."""
    return _class(modules.special_class)


@cache
def _class(name: str | None) -> type:
    from sa_convert.runtime import modeling_shared_attention as modeling
    from sa_convert.runtime import shared_attention_special as special

    if name is None:
        return modeling.TreatedAttention
    made = type(f"Here{name}", (getattr(special, name), modeling.TreatedAttention), {"__module__": __name__})
    setattr(sys.modules[__name__], made.__name__, made)  # where pickle finds it
    return made
