"""Layers with something else in the place of their attention, or nothing. Only plans with such layers carry this file.

They keep nothing in a cache. Masks and positions follow from the length of one layer's cache, though, whichever the
library asks. So the place of such a layer in a cache is taken by one that counts tokens.

Letters in shape comments are those of `modeling_shared_attention`.
"""

from inspect import signature

import torch

from .modeling_shared_attention import in_front, is_cache, is_paged, states_in


class Counted:
    """In front of the class of a cache layer: it keeps nothing of the tokens that it is given, and counts them. Masks
    and positions follow from the length of one layer's cache, whichever that may be."""

    keys = values = None
    is_initialized = True

    def __init__(self, layer, states):
        """layer: the one in whose place it comes. states: (B, T, hidden)."""
        rest = {name: value for name, value in vars(layer).items() if not hasattr(Counted, name)}
        self.__dict__.update(rest, batch_size=len(states), max_batch_size=len(states), cumulative_length=0)
        if self.is_compileable and not self.is_sliding:  # a number would make a graph for every length
            self.cumulative_length = torch.zeros((), dtype=torch.long, device=states.device)
            torch._dynamo.mark_static_address(self.cumulative_length)

    @property
    def cumulative_length_int(self):
        return self.cumulative_length

    def update(self, key_states, value_states, *args, **kwargs):
        self._add(key_states.shape[-2])
        return key_states, value_states

    def _add(self, tokens):
        if isinstance(self.cumulative_length, torch.Tensor):
            self.cumulative_length.add_(tokens)
        else:
            self.cumulative_length += tokens

    def get_seq_length(self):
        return self.cumulative_length

    def crop(self, tokens):
        """As this release's other layers take it: the tokens that go, below 0, or the number of those that stay."""
        stay = "max_length" in signature(type(self).__bases__[1].crop).parameters
        self._add(min(0, tokens - self.cumulative_length) if stay and tokens >= 0 else -abs(tokens))

    def reset(self):
        self._add(-self.cumulative_length)

    def _nothing(self, *args, **kwargs):
        """Where others change what they keep."""

    offload = prefetch = lazy_initialization = reorder_cache = _nothing
    batch_repeat_interleave = batch_select_indices = _nothing


def count_tokens(cache, number, states, *extra):
    """Tell the cache of a layer that keeps nothing of its tokens (B, T, hidden). Raises ValueError if another model
    filled it. A cache of unknown make, or one that is new to a compiled model, gets one number a token."""
    layers, kind = getattr(cache, "layers", ()), getattr(cache, "layer_class_to_replicate", None)
    while kind is not None and len(layers) <= number:
        layers.append(kind())
    layer = layers[number] if number < len(layers) else None
    if layer is not None and not isinstance(layer, Counted) and not torch.compiler.is_compiling():
        if int(layer.get_seq_length()) == 0:
            layers[number] = in_front(Counted, type(layer))(layer, states)
        elif layer.keys is None or layer.keys.shape[1::2] != (1, 1):
            raise ValueError(
                f"shared_attention: layer {number} of this model has no attention and caches nothing, but the cache "
                "given holds tokens already: another model filled it. Let this model fill its cache itself."
            )
    one = states.new_ones(*states.shape[:2], 1)[:, None]
    cache.update(one, one, number, *extra)


class WholeAttention:
    """Before `TreatedAttention`: runs the treatment of a layer as a whole."""

    kept = ()
    """What stays of a module whose attention is gone as a whole."""

    def forward(self, *args, **kwargs):
        if self.plan.whole is None:
            return super().forward(*args, **kwargs)
        held, position = next(filter(is_cache, (*args, *kwargs.values())), None), kwargs.get("cache_position")
        extra = () if position is None else ({"cache_position": position},)
        return self.stand_in(states_in(args, kwargs), held, *extra), None

    def stand_in(self, states, held, *extra):
        """What comes in the place of the layer's attention, (B, T, hidden). held: the cache, or None."""
        if held is not None and not is_paged(held):
            count_tokens(held, self.plan.layer, states, *extra)
        return self.plan.whole.output(self, states)

    def shrink(self, layer, stack):
        """A layer without attention may lack the norm before it, too, as the classes of engines do."""
        if self.plan.whole is None:
            super().shrink(layer, stack)
        elif hasattr(self.names, "gone_norm"):
            setattr(layer, self.names.gone_norm, torch.nn.Identity())

    def hollow(self):
        """Remove all parameters and parts, for something else comes in their place."""
        for name in [*dict(self.named_children()), *dict(self.named_parameters(recurse=False))]:
            if name not in self.kept:
                delattr(self, name)

    def _load_from_state_dict(self, state_dict, prefix, *others):
        """Tensors made for the base model are refused by a sentence."""
        if self.plan.whole is not None:
            mine = [prefix + name for name in self.state_dict()]
            gone = [name for name in state_dict if name.startswith(prefix) and name not in mine]
            if gone:
                told = f"layer {self.plan.layer} has no attention, which its base model has."
                others[-1].append(f"{gone[0]} does not fit: {told}")
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in gone}
        super()._load_from_state_dict(state_dict, prefix, *others)
