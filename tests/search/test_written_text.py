"""Text that a model writes itself: passages with openings of their own, side by side in a row."""

import pytest
import torch

from sa_convert.models.load import load_tokenizer
from sa_convert.observe import written
from support.tiny_models import save_tiny, save_tokenizer


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A model that begins no passage in the middle of one, since it never writes the openings' first tokens."""
    folder = tmp_path_factory.mktemp("writer") / "one"
    model = save_tiny("llama", folder).eval()
    save_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    first = sorted({tokenizer(text)["input_ids"][0] for text in written.OPENINGS})
    head = model.get_output_embeddings()
    kept = torch.ones(head.weight.shape[0])
    kept[first] = 0.0

    def silence(module, args, logits):
        return logits.masked_fill(kept.to(logits.device) == 0, -1e9)

    head.register_forward_hook(silence)
    return model, tokenizer, set(first)


@pytest.mark.parametrize(
    ("length", "beginnings"),
    [(48, (0, 16, 32)), (96, (0, 32, 64)), (128, (0, 32, 64, 96)), (130, (0, 26, 52, 78, 104))],
)
def test_no_passage_is_longer_than_the_longest(writer, monkeypatch, length, beginnings):
    """Three in a short row, and as many as it takes in a long one; the row is full."""
    model, tokenizer, first = writer
    monkeypatch.setattr(written, "LONGEST", 32)
    rows = written.written_by(model, tokenizer, sequences=2, length=length)
    assert rows.shape == (2, length)
    for row in rows.tolist():
        assert tuple(at for at, token in enumerate(row) if token in first) == beginnings


def test_the_same_arguments_give_the_same_text(writer):
    model, tokenizer, _ = writer
    one, same, other = (written.written_by(model, tokenizer, 2, 24, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("length", "made"), [(24, 4), (48, 4), (600, 2)])
def test_a_time_that_does_not_do_gives_fewer_sequences(writer, monkeypatch, length, made):
    """Whole ones, as they would be with more time, and two at least: one to train on and one to judge by."""
    model, tokenizer, _ = writer
    monkeypatch.setattr(written, "LONGEST", 64)
    monkeypatch.setattr(written, "BATCH", 14)  # four sequences of three passages and a piece; one of ten and a piece
    rows = written.written_by(model, tokenizer, 9, length, seconds=0.0)
    assert rows.shape == (made, length)
    assert torch.equal(rows, written.written_by(model, tokenizer, 9, length)[:made])
