"""The decode check crosses windows, and caches are measured at the length of use."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM

from sa_convert.domain.change import CacheBytes, Change
from sa_convert.measure.quality.cache_bytes import Held, bytes_of, cache_bytes, held
from sa_convert.measure.quality.decode import continues_in, decode_check
from sa_convert.measure.quality.questions import decoded
from sa_convert.measure.quality.walk import CROSSING, STEPS, in_one_piece, walk, walked_length
from sa_convert.models.arguments import cache_keyword, last_logits_only
from support.task_models import opened, save
from support.validation_models import VOCABULARY, tiny_config

TOKEN = 5 * 2 * 16 * 2 * 4


def tokens(length: int) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (length,), generator=torch.Generator().manual_seed(1))


def model(kind=LlamaForCausalLM, **changes):
    torch.manual_seed(0)
    return kind(tiny_config(initializer_range=0.5, **changes)).eval()


@pytest.mark.parametrize("window", [1, 5, 40, 200])
def test_a_walk_crosses_the_window_token_by_token(window):
    pieces = walk(walked_length(window, None), window)
    assert sum(pieces) == walked_length(window, None) > window
    assert all(size > 0 for size in pieces)
    begin = 0
    single = set()
    for size in pieces:
        if size == 1:
            single.add(begin)
        begin += size
    assert {window, window + CROSSING - 1} <= single
    assert pieces[-STEPS:] == (1,) * STEPS
    # A piece of several tokens comes when the window has begun to move already.
    assert any(size > 1 for size in pieces[len(pieces) - STEPS - 1 :])
    assert sum(in_one_piece(300, window)) == 300


def test_a_walk_fits_the_positions():
    assert walked_length(200, 210) == 210
    assert sum(walk(210, 200)) == 210
    assert walk(128) == walk(128, 500) == (64, *[1] * 64)


class ForgetsLate(LlamaForCausalLM):
    """Loses count of positions when more than 100 tokens are cached."""

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        cache = kwargs.get(cache_keyword(super()))
        if cache is not None and cache.get_seq_length() > 100:
            position_ids = torch.zeros_like(input_ids)
        return super().forward(input_ids, position_ids=position_ids, **kwargs)


class StepsOnly(LlamaForCausalLM):
    """Right token by token; several tokens after others are taken for the first ones of a text."""

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        cache = kwargs.get(cache_keyword(super()))
        if cache is not None and cache.get_seq_length() > 0 and input_ids.shape[1] > 1:
            position_ids = torch.arange(input_ids.shape[1])[None]
        return super().forward(input_ids, position_ids=position_ids, **kwargs)


def test_a_fault_behind_the_window_is_found():
    late = model(ForgetsLate)
    assert decode_check(late, tokens(96)).passed
    length = walked_length(90, None)
    check = decode_check(late, tokens(length), pieces=walk(length, 90))
    assert not check.passed
    assert check.max_abs_logit_difference > check.tolerance
    right = decode_check(model(), tokens(length), pieces=walk(length, 90))
    assert right.passed


def test_prompts_in_pieces_are_checked_if_the_base_takes_them():
    length = walked_length(60, None)
    sequence, pieces = tokens(length), walk(length, 60)
    steps = model(StepsOnly)
    assert continues_in(model(), sequence, pieces)
    assert not continues_in(steps, sequence, pieces)
    assert not decode_check(steps, sequence, pieces=pieces).passed
    assert decode_check(steps, sequence, pieces=in_one_piece(length, 60)).passed


def test_a_decoder_with_an_encoder_crosses_the_window(tmp_path):
    several, _, task, rows = opened(save(tmp_path / "t5", "t5"))
    assert len(task.decoding(several, rows[0]).tokens) < 50
    decoding = decoded(task, several, rows, 50, None)
    assert len(decoding.tokens) == walked_length(50, None)
    pieces = walk(len(decoding.tokens), 50)
    assert continues_in(several, decoding.tokens, pieces, decoding.source)
    assert decode_check(several, decoding.tokens, source=decoding.source, pieces=pieces).passed
    short = decoded(task, several, rows, None, None)
    assert torch.equal(short.tokens, task.decoding(several, rows[0]).tokens)


def test_bytes_of_a_cache_that_grows():
    growing = model()
    assert last_logits_only(growing) == {"logits_to_keep": 1}
    for length in (16, 100):
        assert cache_bytes(growing, tokens(length)) == Held(length * TOKEN)
        assert cache_bytes(growing, tokens(length), torch.bfloat16) == Held(length * TOKEN // 2)


def test_bytes_of_a_cache_with_sliding_layers():
    torch.manual_seed(0)
    sliding = AutoModelForCausalLM.from_config(tiny_config("mistral", sliding_window=8)).eval()
    # transformers keeps one token fewer than the window, since the next one belongs to it.
    assert cache_bytes(sliding, tokens(5)).needed == 5 * TOKEN
    assert cache_bytes(sliding, tokens(100)).needed == 7 * TOKEN


def test_bytes_of_an_encoder_decoder(tmp_path):
    several, _, task, rows = opened(save(tmp_path / "t5", "t5"))
    decoding = task.decoding(several, rows[0])
    written, read = decoding.tokens[:7], decoding.source[:11]
    # 2 layers of 4 heads of 8 elements, key and value, of what was written and of what was read.
    assert cache_bytes(several, written, None, read).needed == 2 * (7 + 11) * 4 * 8 * 2 * 4


class Part:
    def __init__(self, **tensors):
        vars(self).update(tensors)


def test_tensors_count_once_and_by_what_they_show():
    room = torch.zeros(1, 2, 64, 4)
    shown = room[:, :, :10]
    assert bytes_of(Part(keys=shown)) == 2 * 10 * 4 * 4
    assert bytes_of(Part(room=room, keys=shown)) == 2 * 10 * 4 * 4
    assert bytes_of(Part(keys=room, values=room)) == room.nbytes
    halves = torch.zeros(1, 2, 10, 8)
    assert bytes_of(Part(keys=halves[..., :4], values=halves[..., 4:])) == halves.nbytes
    counters = Part(count=torch.tensor(7), places=torch.arange(5), function=lambda: room, config=Part(room=room))
    assert bytes_of(counters) == 0
    nested = Part(layers=[Part(parts={"full": Part(keys=shown)}, values=torch.zeros(2, 3, dtype=torch.int8))])
    assert bytes_of(nested) == 2 * 10 * 4 * 4 + 6
    assert bytes_of(nested, torch.float16) == 2 * 10 * 4 * 2 + 6
    nested.layers.append(nested)  # in a circle
    assert bytes_of(nested) == 2 * 10 * 4 * 4 + 6


def test_a_layer_with_room_says_what_it_needs():
    keys = torch.zeros(1, 2, 10, 4)
    layer = Part(keys=keys, values=keys.clone(), nbytes=2 * 2 * 7 * 4 * 4)
    cache = Part(layers=[layer, Part(keys=keys.clone())])
    assert held(cache) == Held(needed=448 + keys.nbytes, room=192)
    assert held(cache, torch.float16) == Held(needed=224 + keys.nbytes // 2, room=96)


def test_bytes_of_a_cache_that_was_filled_by_hand():
    cache = DynamicCache()
    for layer in range(3):
        cache.update(torch.zeros(1, 2, 9, 4), torch.zeros(1, 2, 9, 6), layer)
    assert bytes_of(cache) == 3 * 2 * 9 * (4 + 6) * 4


def test_a_change_of_a_cache_as_json():
    assert CacheBytes(200, 50, 4096, 2048).to_json() == {
        "at": 4096, "before": 200, "after": 50, "removed": 0.75, "measured_at": 2048, "room": None
    }  # fmt: skip
    assert CacheBytes(200, 50, 1).removed == Change(200, 50).removed
