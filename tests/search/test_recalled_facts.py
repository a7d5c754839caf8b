"""Facts in long calibration text that are asked for at its end."""

import torch

from sa_convert.measure.quality.needle import NAMES, STATEMENT
from sa_convert.observe.long_sequences import long_set
from sa_convert.observe.recalled_facts import CODE, MOST, WORDS, recalled
from sa_convert.observe.sequences import FACTS
from sa_convert.texts.text import load_text
from support.tiny_models import save_tokenizer


def _tokenizer(folder):
    from transformers import AutoTokenizer

    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_each_code_that_is_asked_for_stands_in_the_text_once_before(tmp_path):
    tokenizer = _tokenizer(tmp_path)
    vocabulary = torch.arange(40, 250)
    text = torch.full((900,), 7)
    sample = recalled(tokenizer, text, vocabulary, torch.Generator().manual_seed(1), WORDS["calibration"], start=2)
    assert sample is not None
    assert len(sample.tokens) == 900
    assert sample.tokens[:2].tolist() == [7, 7]
    places = sample.scored.nonzero()[:, 0].tolist()
    runs = [places[at : at + CODE] for at in range(0, len(places), CODE)]
    assert 1 < len(runs) <= MOST
    tokens = sample.tokens.tolist()
    first_asked = min(places)
    for run in runs:
        assert run == list(range(run[0], run[0] + CODE))
        code = [tokens[at] for at in run]
        before = [at for at in range(first_asked - CODE) if tokens[at : at + CODE] == code]
        assert len(before) == 1
        assert tokens[before[0] - 1] == tokens[run[0] - 1]  # the end of the same opening words
    told = sorted(run[0] for run in runs)
    assert told[0] > 900 * 0.6


def test_a_text_that_is_too_short_has_none(tmp_path):
    tokenizer = _tokenizer(tmp_path)
    found = recalled(tokenizer, torch.full((20,), 7), torch.arange(40, 90), torch.Generator(), WORDS["held out"])
    assert found is None


def test_long_sequences_hold_facts_in_both_parts_and_never_the_words_of_the_validation(tmp_path):
    long = long_set(_tokenizer(tmp_path), 300, load_text("builtin"), 512)
    for part in (long.fit, long.held_out):
        few = [sample for sample in part if sample.kind == FACTS]
        assert few
        assert all(sample.repetition and sample.weight > 0 and sample.period == 0 for sample in few)
    words = [word.replace("{}", "").strip() for word, _ in WORDS.values()]
    assert len(set(words)) == 2
    assert not any(word in STATEMENT[0] or name in word for word in words for name in NAMES)
