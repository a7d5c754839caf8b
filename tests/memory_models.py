"""Converted models of random weights, made in memory by the package's code, and the maps for them."""

import torch
import transformers
from tiny_models import tiny_config

from sa_convert.export.configuration_shared_attention import config_class_of
from sa_convert.export.modeling_shared_attention import model_class_of
from sa_convert.export.shared_attention_families import FAMILIES

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
