"""Models that share attention across layers.

The class `SharedAttention<Base>` exists for every model class `<Base>` of the families in `shared_attention_families`,
whatever its head; it is made when it is first asked for. It is the base class, with the attention of sharing layers
changed as `config.shared_attention` says: see `shared_attention`.
"""

from contextlib import contextmanager
from functools import cache

import transformers

from .configuration_shared_attention import config_class_of

# transformers 4 copies only those files of a local folder that this one names, so it names them all.
from .shared_attention import SharedAttention  # noqa: F401
from .shared_attention_apply import share_attention
from .shared_attention_arguments import is_newer, unlike
from .shared_attention_attend import Attending  # noqa: F401
from .shared_attention_cache import PackedCache  # noqa: F401
from .shared_attention_exchange import checkpoint_contexts, opening
from .shared_attention_families import CLASS_PREFIX, FAMILIES, PREFIX, Family, auto_class_of
from .shared_attention_modules import MODULES  # noqa: F401
from .shared_attention_paged import PagedCache  # noqa: F401
from .shared_attention_plan import LayerPlan  # noqa: F401
from .shared_attention_weights import weigh  # noqa: F401

if transformers.__version__ == "5.3.0" and __name__.startswith("transformers_modules"):
    raise ImportError(
        "transformers 5.3.0 loses the tied weights of every model that comes with code of its own: run "
        "pip install -U transformers."
    )


@contextmanager
def _as_base(config, family: Family):
    """While open, the config is of its base's class: some heads ask an auto class for their base model."""
    ours = type(config)
    config.__class__ = getattr(transformers, family.config_class)
    try:
        yield
    finally:
        config.__class__ = ours


class SharedAttentionMixin:
    """Builds the base model, then makes it share attention.

    base_class: the class of transformers that the model derives from. Some of what transformers does for a model it
    decides by the name of its class or by the source code around that, where it looks for the base's.
    """

    base_class: type

    def __init__(self, config, *args, **kwargs):
        family = FAMILIES[config.model_type.removeprefix(PREFIX)]
        with _as_base(config, family):
            super().__init__(config, *args, **kwargs)
        share_attention(self, family, config.shared_attention)

    def _get_name(self):
        """By this name, which is also printed, Trainer tells whose labels are to be shifted."""
        return self.base_class.__name__

    @classmethod
    def _can_set_attn_implementation(cls):
        return cls.base_class._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls):
        return cls.base_class._can_set_experts_implementation()

    if is_newer():  # what a later release changed shows anywhere in a pass

        def __call__(self, *args, **kwargs):
            try:
                return super().__call__(*args, **kwargs)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise RuntimeError(unlike(f"{type(error).__name__}: {error}")) from error

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, **kwargs):
        """As in the base class, without re-entrant checkpointing: it would cut the gradient to queries and keys of
        source layers, which reach reusing layers beside the layer's input. Raises ValueError where it is asked for."""
        options = dict(gradient_checkpointing_kwargs or {})
        if options.setdefault("use_reentrant", False):
            raise ValueError(
                "A model with shared attention needs gradient_checkpointing_kwargs={'use_reentrant': False}: "
                "re-entrant checkpointing loses gradients of attention that is shared between layers."
            )
        if FAMILIES[self.config.model_type.removeprefix(PREFIX)].exchange == "context":
            options.setdefault("context_fn", checkpoint_contexts)
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs=options, **kwargs)


def _register_conversions(family: Family, architecture: str) -> None:
    """Checkpoints keep the tensor names of the base, so transformers 5 must convert them as it does the base's."""
    try:
        from transformers.conversion_mapping import (
            get_checkpoint_conversion_mapping,
            register_checkpoint_conversion_mapping,
        )
    except ImportError:  # transformers 4 loads every checkpoint as it is
        return
    for base, ours in (
        (family.model_type, PREFIX + family.model_type),
        (architecture, CLASS_PREFIX + architecture),
    ):
        conversions = get_checkpoint_conversion_mapping(base)
        if conversions is not None:
            register_checkpoint_conversion_mapping(ours, conversions, overwrite=True)


@cache
def model_class_of(family: Family, architecture: str) -> type:
    """The model class of a family for one of its base's classes, such as LlamaForCausalLM, sharing attention."""
    _register_conversions(family, architecture)
    base = getattr(transformers, architecture)
    members = {"config_class": config_class_of(family), "base_class": base, "__module__": __name__}
    members["forward"] = opening(base.forward)
    return type(CLASS_PREFIX + architecture, (SharedAttentionMixin, base), members)


def __getattr__(name: str):
    architecture = name.removeprefix(CLASS_PREFIX)
    if architecture != name:
        for family in FAMILIES.values():
            if auto_class_of(family, architecture):
                return model_class_of(family, architecture)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
