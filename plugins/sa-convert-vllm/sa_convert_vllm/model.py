"""Converted models in vLLM: the code of their folder on vLLM's Transformers backend, with attention layers of ours."""

from collections import Counter

from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.transformers import TransformersForCausalLM

from .layers import NarrowAttention, SplitAttention, WindowAttention
from .parts import page_classes, parts_of, room, unit_of, windows_of, without_windows
from .refusals import refuse
from .sharing import borrowed_of, gone_of, narrow_of
from .wide import BorrowedAttention, SourceAttention

logger = init_logger(__name__)


class TreatedForCausalLM(TransformersForCausalLM):
    def __init__(self, *, vllm_config, prefix=""):
        config = vllm_config.model_config.hf_config
        described = getattr(config, "shared_attention_served", None) or config.shared_attention
        refuse(described, vllm_config)
        self.__dict__["described"] = described
        # The folder's code is told of all treatments but windows: they change no weight, and pages do them here.
        config.shared_attention_served, config.shared_attention = described, without_windows(described)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def _get_attn_cls(self):
        """What makes the attention layer of each layer of the model; `num_heads` and `num_kv_heads` are a rank's."""
        found = super()._get_attn_cls()
        return found if found is not Attention else LayerMaker(self).make


class LayerMaker:
    """Makes vLLM's attention layers for those of a model."""

    def __init__(self, model):
        text, parallel = model.text_config, model.parallel_config
        self.model, self.described = model, model.described
        self.groups = text.num_key_value_heads
        self.ranks, self.rank = parallel.tensor_parallel_size, get_tensor_model_parallel_rank()
        self.gone = gone_of(self.described)
        self.windows = windows_of(self.described, self.groups)
        self.borrowed = borrowed_of(self.described, self.groups)
        lend = {*self.borrowed, *self.borrowed.values()}
        narrow = narrow_of(self.described, self.groups)
        self.narrow = {layer: width for layer, width in narrow.items() if layer not in lend}
        if self.windows and (self.borrowed or self.narrow):
            logger.warning(
                "sa-convert: layers %s cache whole keys and values all the same: their pages are of another size than "
                "those of windows.",
                ", ".join(map(str, sorted({*self.borrowed, *self.narrow}))),
            )
            self.borrowed, self.narrow = {}, {}
        if (self.borrowed or self.narrow) and not self._saves():
            logger.warning(
                "sa-convert: layers %s cache whole keys and values all the same: in a model some of whose layers have "
                "windows, all pages have the size of the largest, which would need more than is saved.",
                ", ".join(map(str, sorted({*self.borrowed, *self.narrow}))),
            )
            self.borrowed, self.narrow = {}, {}
        if self.ranks > 1 and not any(".self_attn." in rule for rule in model.model.tp_plan or {}):
            raise ValueError(
                "sa-convert: this plan cannot be divided among ranks, since heads reuse others than their own number, "
                "or keys or values are of low rank: serve the model without tensor parallelism."
            )
        self.made: dict = {}
        if self.windows:
            self._divide(text.num_hidden_layers)

    def _saves(self):
        """Whether pages of another size, for layers that borrow or have narrow values, make room."""
        text, config = self.model.text_config, self.model.vllm_config
        types = getattr(text, "layer_types", None) or [None] * text.num_hidden_layers
        windows = [text.sliding_window if kind == "sliding_attention" else None for kind in types]
        head = config.model_config.get_head_size()
        cached = [layer for layer in range(len(windows)) if layer not in self.gone]
        sizes = {layer: 1 + self.narrow.get(layer, head) / head + len(self._borrowers(layer)) for layer in cached}
        told = config.cache_config.block_size, config.model_config.max_model_len, config.max_in_flight_tokens
        treated = [(windows[layer], sizes[layer]) for layer in cached if layer not in self.borrowed]
        return room(treated, *told) < room([(windows[layer], 2.0) for layer in cached], *told)

    def _divide(self, depth):
        rows = {
            layer: self.windows.get(layer, [None] * self.groups) for layer in range(depth) if layer not in self.gone
        }
        self.unit, share = unit_of(self.windows, self.groups, self.ranks), self.groups // self.ranks
        parts = {
            (layer, rank): parts_of(row[rank * share : (rank + 1) * share], self.unit)
            for layer, row in rows.items()
            for rank in range(self.ranks)
        }
        counts = Counter(part.window for each in parts.values() for part in each)
        full, config = counts.pop(None, 0), self.model.vllm_config
        length, at_once = config.model_config.max_model_len, config.max_in_flight_tokens
        self.classes = page_classes(counts, full, config.cache_config.block_size, length, at_once)
        self.parts = {layer: parts[layer, self.rank] for layer in rows}

    def make(self, prefix, **kwargs):
        layer = int(prefix.partition(".layers.")[2].partition(".")[0])
        if layer in self.gone:
            return nn.Identity()  # nothing calls it, and it has no pages
        if self.windows:
            return self._parted(layer, prefix, **kwargs)
        if layer in self.borrowed:
            source = self.borrowed[layer]
            if source not in self.made:
                raise ValueError(
                    f"sa-convert: layer {layer} reuses the attention of layer {source}, which is not in this process: "
                    "serve the model without pipeline parallelism."
                )
            return BorrowedAttention(self.made[source], 1 + self._borrowers(source).index(layer))
        if borrowers := self._borrowers(layer):
            self.made[layer] = SourceAttention(borrowers=len(borrowers), prefix=prefix, **kwargs)
            return self.made[layer]
        if layer in self.narrow:
            return NarrowAttention(width=self.narrow[layer], prefix=prefix, **kwargs)
        return Attention(prefix=prefix, **kwargs)

    def _borrowers(self, source):
        return sorted(layer for layer, at in self.borrowed.items() if at == source)

    def _parted(self, layer, prefix, num_heads, num_kv_heads, **kwargs):
        group, first = num_heads // num_kv_heads, self.rank * num_kv_heads
        made = []
        for part in self.parts[layer]:
            given = {**kwargs, "num_heads": part.count * group, "num_kv_heads": part.count}
            given["prefix"] = f"{prefix}.groups_{first + part.first}"
            if part.window is None:
                made.append((part.first, Attention(**given)))
                continue
            own = given.pop("per_layer_sliding_window", None) or self.model.cache_config.sliding_window
            pages = self.classes[part.window]
            made.append((part.first, WindowAttention(window=part.window, pages=pages, limit=own, **given)))
        return SplitAttention(made, kwargs["head_size"])
