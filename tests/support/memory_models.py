"""Converted models of random weights, made in memory by the package's code, and the maps for them."""

import torch
import transformers

from sa_convert.families.table import FAMILIES
from sa_convert.treated_classes import config_class_of, model_class_of
from support.tiny_models import tiny_config


def rows_of(heads, source, other):
    """Two rows of the map: every head of a layer, in another order; and a group of two, and the last head."""
    whole = [[source, heads - 1 - head] for head in range(heads)]
    return whole, [[source, 1], [source, 0], *[None] * (heads - 3), [other, heads - 2]]


def made(model_type, seed=0, share=True, rows=(0, 1, 2, 3), heads=8, **changes):
    """A converted model of random weights, or its base. rows: the layers that lends to the reusing ones, the one that
    reuses wholly, another that lends, and the one that reuses in part, of layers that may share with each other."""
    family = FAMILIES[model_type]
    config = tiny_config(model_type, **changes)
    first, whole, second, part = rows
    layers = {}
    for stack in family.all_stacks:
        name = f"{stack.name}." if stack.name else ""
        layers[f"{name}{whole}"], layers[f"{name}{part}"] = rows_of(heads, first, second)
    torch.manual_seed(seed)
    if share:
        keys = {key: value for key, value in config.to_dict().items() if key != "model_type"}
        config = config_class_of(family)(**keys, shared_attention={"layers": layers})
        model = model_class_of(family, family.default_class)(config).eval()
    else:
        model = getattr(transformers, family.default_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(model, length=9, seed=1):
    """Two sequences of random tokens, as keyword arguments."""
    torch.manual_seed(seed)
    ids = torch.randint(3, 128, (2, length))
    return {"input_ids": ids, **({"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {})}


# Of layers with 8 heads in 4 groups: a whole layer, a group with its heads exchanged, and single heads of two layers.
WHOLE = [[0, head] for head in range(8)]
GROUP = [[0, 1], [0, 0], *[None] * 6]
HEADS = [None, [0, 3], None, [0, 0], [0, 5], None, None, [0, 2]]
MIXED = {"1": WHOLE, "2": GROUP, "3": HEADS}


def in_memory(model_type, layers=MIXED, architecture=None, seed=0, **changes):
    """A converted model with this map; layers: None, the base."""
    family = FAMILIES[model_type]
    config = tiny_config(model_type, **changes)
    architecture = architecture or family.default_class
    torch.manual_seed(seed)
    if layers is None:
        return getattr(transformers, architecture)(config).eval()
    keys = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    ours = config_class_of(family).from_dict({**keys, "shared_attention": {"layers": layers}})
    return model_class_of(family, architecture)(ours).eval()


def some_ids(tokens=12, seed=1):
    return torch.randint(3, 128, (2, tokens), generator=torch.Generator().manual_seed(seed))
