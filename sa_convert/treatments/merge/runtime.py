"""Layers with fewer KV groups than the base's, in a converted model, which more query heads read.

The projections of the checkpoint make fewer keys and values, and queries for these; nothing else is computed. So the
module is that of the family, told of other numbers.
"""


class Merge:
    """Layers with fewer KV groups, in one stack. stack: see `modeling_shared_attention.treat`. Raises ValueError for
    numbers that cannot be."""

    divisible = False

    def __init__(self, stack):
        self.heads = {layer: stack.shapes[layer][0] for layer in stack.layers}
        self.groups = {}
        for layer, told in stack.told.items():
            _, count = stack.sizes[layer]
            numbers = {arguments["groups"] for arguments in told.values()}
            left = min(numbers)
            if len(numbers) > 1 or set(told) != set(range(count)) or not 0 < left < count or count % left:
                raise ValueError(f"shared_attention: layer {layer} cannot have {left} of its {count} KV groups left.")
            self.groups[layer] = left

    def touches(self, layer):
        return layer in self.groups

    def own_heads(self, layer):
        return tuple(range(self.heads[layer]))

    def unserved(self):
        return (
            "this engine knows of fewer KV groups in some layers only by what `for: vllm` writes"
            if self.groups
            else None
        )

    def enter(self, attention):
        """Take from a module the keys and values that it has too many of."""
        plan, names = attention.plan, attention.names
        left = self.groups[plan.layer]
        for name in (names.key, names.value):
            attention.keep_heads(getattr(attention, name), range(left), plan.groups)
        plan.group, plan.own_groups = plan.heads // left, tuple(range(left))
        for name, number in (("num_key_value_groups", plan.group), ("num_key_value_heads", left)):
            if hasattr(attention, name):
                setattr(attention, name, number)

    def attend(self, call, query, key, value, mask, then):
        return then(query, key, value, mask)
