"""Pages of a window with sinks in vLLM's cache: the first ones of a text stay, the window's follow it."""

from dataclasses import dataclass

from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec


class SinkWindowManager(SlidingWindowManager):
    """As vLLM's for sliding windows, except that the blocks of the first tokens are neither freed nor skipped."""

    @staticmethod
    def first_blocks(spec):
        return -(-spec.sinks // spec.block_size)

    def _remove_blocks_in_range(self, request_id, first_block, last_block):
        super()._remove_blocks_in_range(request_id, max(first_block, self.first_blocks(self.kv_cache_spec)), last_block)

    def _kept(self, new_computed_blocks, tokens):
        """Of the blocks that were found in the cache, those which the base would drop and sinks need."""
        skipped = self.get_num_skipped_tokens(tokens) // self.block_size
        return list(new_computed_blocks[: min(skipped, self.first_blocks(self.kv_cache_spec))])

    def get_num_blocks_to_allocate(
        self, request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
    ):
        needed = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
        )
        if request_id in self.num_cached_block:
            return needed
        return needed + self._get_num_evictable_blocks(self._kept(new_computed_blocks, total_computed_tokens))

    def add_local_computed_blocks(
        self, request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
    ):
        kept = self._kept(new_computed_blocks, num_local_computed_tokens + num_external_computed_tokens)
        if kept:
            self.block_pool.touch(kept)  # before others are taken
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        self.req_to_blocks[request_id][: len(kept)] = kept

    @classmethod
    def find_longest_cache_hit(cls, block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, **others):
        """As in the base; nothing is found if the first blocks are not."""
        found, length = super().find_longest_cache_hit(
            block_hashes=block_hashes,
            max_length=max_length,
            kv_cache_group_ids=kv_cache_group_ids,
            block_pool=block_pool,
            kv_cache_spec=kv_cache_spec,
            **others,
        )
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, kv_cache_spec.block_size)
        for place in range(min(cls.first_blocks(kv_cache_spec), len(found[0]))):
            first = block_pool.get_cached_block(hashes[place], kv_cache_group_ids)
            if not first:
                return tuple([] for _ in kv_cache_group_ids), 0
            for blocks, block in zip(found, first, strict=True):
                blocks[place] = block
        return found, length

    @classmethod
    def reachable_block_mask(cls, start_block, end_block, alignment_tokens, kv_cache_spec, *args, **kwargs):
        mask = super().reachable_block_mask(start_block, end_block, alignment_tokens, kv_cache_spec, *args, **kwargs)
        for place in range(start_block, min(end_block, cls.first_blocks(kv_cache_spec)) if mask else start_block):
            mask[place - start_block] = True
        return mask


@register_kv_cache_spec(manager_class=SinkWindowManager)
@dataclass(frozen=True, kw_only=True)
class SinkWindowSpec(SlidingWindowSpec):
    """sinks: tokens at the beginning of a text whose pages stay."""

    sinks: int = 0

    def max_admission_blocks_per_request(self, max_in_flight_tokens, max_model_len):
        window = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        return min(window + -(-self.sinks // self.block_size), -(-max_model_len // self.block_size))

    def is_uniform_with_collection(self, kv_cache_specs):
        return all(
            isinstance(spec, SinkWindowSpec) and (spec.sliding_window, spec.sinks) == (self.sliding_window, self.sinks)
            for spec in kv_cache_specs.values()
        )
