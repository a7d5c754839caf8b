"""Models of random weights with windows, made in memory by the package's code, beside bases of the same weights."""

import torch
import transformers

from sa_convert.families.table import FAMILIES
from sa_convert.treated_classes import config_class_of, model_class_of
from support.forced_rows import forced_rows
from support.tiny_models import attentions_of, tiny_config

# By layer and KV group, sinks and tokens: the first layer; all groups of a layer; windows that differ in one layer.
MIXED = {
    0: {0: (2, 4), 2: (1, 6)},
    2: {0: (2, 5), 1: (2, 5), 2: (2, 5), 3: (2, 5)},
    3: {1: (0, 3), 2: (2, 4), 3: (2, 4)},
}
EVERY = {layer: dict.fromkeys(range(4), (2, 5)) for layer in range(6)}


def described(family, plan, stack="", more=None):
    """A plan as config.json has it. more: {layer: {group: {treatment: arguments}}}, besides."""
    layers = {}
    for layer, groups in plan.items():
        layers[f"{stack}{layer}"] = {
            str(group): {"window": {"sinks": sinks, "tokens": tokens}} for group, (sinks, tokens) in groups.items()
        }
    for layer, groups in (more or {}).items():
        layers.setdefault(str(layer), {}).update({str(group): told for group, told in groups.items()})
    return {"version": 2, "layers": layers, "modules": family.modules.to_json()}


class Pair:
    """A base in eager mode, and its windowed model with a kernel of choice. groups: KV groups in a layer."""

    def __init__(
        self, model_type, plan=MIXED, kernel="sdpa", stack="", architecture=None, groups=4, more=None, **changes
    ):
        family = FAMILIES[model_type]
        config = tiny_config(model_type, **changes)
        architecture = architecture or family.default_class
        torch.manual_seed(0)
        self.base = getattr(transformers, architecture)._from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in self.base.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        keys = {key: value for key, value in config.to_dict().items() if key != "model_type"}
        ours = config_class_of(family).from_dict({**keys, "shared_attention": described(family, plan, stack, more)})
        self.model = model_class_of(family, architecture)._from_config(ours, attn_implementation=kernel).eval()
        self.model.load_state_dict(self.base.state_dict())
        self.attentions = attentions_of(self.base, family)
        first = next((n for n, each in enumerate(family.all_stacks) if each.name == stack.rstrip(".")), 0)
        depth = len(self.attentions) // len(family.all_stacks)
        self.plan = {layer + first * depth: groups for layer, groups in plan.items()}
        self.groups = groups

    def forced(self, real=None):
        """While open, the base attends by the plan."""
        return forced_rows(self.attentions, self.plan, self.groups, real)

    @torch.no_grad()
    def expected(self, ids, mask=None, **inputs):
        """Logits of the base under the plan."""
        with self.forced(mask):
            return self.base(ids, attention_mask=mask, use_cache=False, **inputs).logits
