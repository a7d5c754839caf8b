"""Windows in decoders beside an encoder: caches of both, beams, tokens taken back, padding in the decoder's text."""

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from sa_convert.families.table import FAMILIES
from support.forced_rows import forced_rows
from support.planned_folders import convert_by_plan, told, windows_for
from support.tiny_models import attentions_of, geometry_of_folder, load_converted, save_tiny

# Relative positions that the first layer makes for all; learned ones; sines of two kinds.
TYPES = ("t5", "bart", "m2m_100", "marian")
LENGTH = 20


class Case:
    def __init__(self, family, root):
        self.base = save_tiny(family, root / "base")
        geometry = geometry_of_folder(root / "base")
        self.windows = windows_for(geometry)
        self.groups = geometry.layers[0].groups
        self.attentions = attentions_of(self.base, FAMILIES[family])
        self.model = load_converted(convert_by_plan(root / "base", told(self.windows), root / "out"))
        generator = torch.Generator().manual_seed(7)
        self.ids, self.text = (torch.randint(3, 128, (2, length), generator=generator) for length in (12, LENGTH))
        self.mask = torch.ones_like(self.ids)
        self.mask[1, 8:] = 0
        self.encoded = self.model.get_encoder()(self.ids, attention_mask=self.mask)

    def forced(self, real=None):
        return forced_rows(self.attentions, self.windows, self.groups, real)

    @torch.no_grad()
    def expected(self, text, real=None):
        with self.forced(real):
            inputs = {"attention_mask": self.mask, "decoder_attention_mask": real, "use_cache": False}
            return self.base(self.ids, decoder_input_ids=text, **inputs).logits

    @torch.no_grad()
    def found(self, text, cuts, cache, start=0, real=None):
        """Logits of the text from `start` on, in pieces up to these places."""
        logits = []
        for stop in cuts:
            inputs = {} if real is None else {"decoder_attention_mask": real[:, :stop]}
            logits.append(
                self.model(
                    encoder_outputs=self.encoded,
                    attention_mask=self.mask,
                    decoder_input_ids=text[:, start:stop],
                    past_key_values=cache,
                    use_cache=True,
                    **inputs,
                ).logits
            )
            start = stop
        return torch.cat(logits, dim=1)

    def cache(self):
        config = self.model.config.get_text_config(decoder=True)
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))


@pytest.fixture(scope="module", params=TYPES)
def case(request, tmp_path_factory):
    with torch.no_grad():
        return Case(request.param, tmp_path_factory.mktemp(request.param))


CUTS = {"whole": [LENGTH], "pieces": [3, 5, 6, 13, 19, LENGTH], "steps": list(range(1, LENGTH + 1))}


@pytest.mark.parametrize("cuts", CUTS)
def test_pieces(case, cuts):
    expected = case.expected(case.text)
    torch.testing.assert_close(case.found(case.text, CUTS[cuts], case.cache()), expected, atol=1e-4, rtol=1e-4)


def test_a_static_cache(case):
    config = case.model.config.get_text_config(decoder=True)
    caches = (StaticCache(config=config, max_cache_len=length) for length in (LENGTH + 4, 12))
    found = case.found(case.text, CUTS["steps"], EncoderDecoderCache(*caches))
    torch.testing.assert_close(found, case.expected(case.text), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_the_decoder(case, side, cuts):
    real = torch.ones_like(case.text)
    real[0, slice(0, 6) if side == "left" else slice(LENGTH - 6, None)] = 0
    found, expected = case.found(case.text, CUTS[cuts], case.cache(), real=real), case.expected(case.text, real)
    torch.testing.assert_close(found[real.bool()], expected[real.bool()], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}], ids=str)
def test_generate(case, options):
    options = {"max_new_tokens": 14, "do_sample": False, "attention_mask": case.mask, "eos_token_id": None, **options}
    torch.manual_seed(0)
    with case.forced():
        expected = case.base.generate(case.ids, use_cache=False, **options)
    for way in ({}, {"cache_implementation": "static"}):
        torch.manual_seed(0)
        assert torch.equal(case.model.generate(case.ids, **options, **way), expected), way


def test_tokens_are_taken_back(case):
    others, cache = torch.cat([case.text[:, :12], case.text.flip(0)[:, 12:]], dim=1), case.cache()
    case.found(others, [12, *range(13, LENGTH + 1)], cache)
    cache.crop(12 - LENGTH)
    found = case.found(case.text, range(13, LENGTH + 1), cache, start=12)
    torch.testing.assert_close(found, case.expected(case.text)[:, 12:], atol=1e-4, rtol=1e-4)


def test_rows_of_a_cache(case):
    cache, order = case.cache(), torch.tensor([1, 0])
    case.found(case.text, [9, 14], cache)
    cache.reorder_cache(order)
    swapped = case.text[order]
    with torch.no_grad():
        encoded = case.model.get_encoder()(case.ids[order], attention_mask=case.mask[order])
        found = case.model(
            encoder_outputs=encoded,
            attention_mask=case.mask[order],
            decoder_input_ids=swapped[:, 14:],
            past_key_values=cache,
        ).logits
    torch.testing.assert_close(found, case.expected(case.text)[order][:, 14:], atol=1e-4, rtol=1e-4)
