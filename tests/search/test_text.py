"""Text for calibration and validation, and its tokens."""

import json
import sys
from collections.abc import Iterable

import pytest

from sa_convert.errors import DataError
from sa_convert.models.tokens import token_sequences
from sa_convert.texts.text import Document, Text, cut, load_text


class CharacterTokenizer:
    """A token a character; starts a text with token 1 if told to."""

    def __init__(self, starts: bool) -> None:
        self.bos_token_id = 1 if starts else None
        self._starts = starts

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        start = [1] if add_special_tokens and self._starts else []
        return {"input_ids": start + [ord(character) for character in text]}


def paragraphs(text: Text) -> set[str]:
    return {part for document in text.documents for part in document.text.split("\n\n") if len(part) > 100}


def text_of(*documents: str) -> Text:
    return Text("test", tuple(Document(text, "text", "validation") for text in documents))


def test_builtin_is_the_same_every_time_and_its_parts_share_no_paragraph():
    text = load_text("builtin")
    assert text == load_text("builtin")
    calibration, validation = text.split("calibration"), text.split("validation")
    assert len(calibration.documents) + len(validation.documents) == len(text.documents)
    assert len(paragraphs(calibration)) > 500
    assert len(paragraphs(validation)) > 500
    assert not paragraphs(calibration) & paragraphs(validation)


def test_builtin_holds_every_kind_in_any_stretch():
    documents = load_text("builtin").split("calibration").documents
    assert {document.kind for document in documents[:4]} == {"prose", "code", "table", "repetition"}
    repetition = next(document.text for document in documents if document.kind == "repetition")
    third = len(repetition) // 3
    assert repetition[:third] == repetition[third : 2 * third] == repetition[2 * third :]


def test_kinds_are_chosen_and_named():
    text = load_text("builtin").split("validation", ("prose", "code"))
    assert {document.kind for document in text.documents} == {"prose", "code"}
    assert text.name == "builtin, validation part (prose and code)"


def test_kinds_do_not_empty_a_text_that_has_none(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 2000)
    assert load_text(str(tmp_path / "a.txt")).split("validation", ("prose",)).documents


def test_cut_loses_nothing_and_prefers_paragraphs():
    text = ("x" * 90 + "\n\n") * 40
    pieces = list(cut(text, 200))
    assert "".join(pieces) == text
    assert all(piece.endswith("\n\n") and 200 <= len(piece) <= 400 for piece in pieces[:-1])


@pytest.mark.parametrize("length", [30, 9_000])
def test_file_first_half_calibrates_and_second_validates(tmp_path, length):
    file = tmp_path / "notes.md"
    file.write_text("".join(f"{number:06d} " for number in range(length)))
    text = load_text(str(file))
    first, second = ("".join(d.text for d in text.split(part).documents) for part in ("calibration", "validation"))
    assert (first + second).strip() == file.read_text().strip()
    assert 0.3 < len(first) / len(first + second) < 0.7
    assert text.name == "file notes.md"


def test_jsonl(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"row {n}"}) for n in range(6)) + "\n\n")
    assert [document.text.strip() for document in load_text(str(file)).documents] == [f"row {n}" for n in range(6)]


@pytest.mark.parametrize("line", ["{oops", '{"words": "x"}', '{"text": 3}', '["text"]'])
def test_bad_jsonl_line_is_named(tmp_path, line):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 2"):
        load_text(str(file))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_that_is_not_utf8(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "caf\xe9"}')
    with pytest.raises(DataError, match="not UTF-8"):
        load_text(str(tmp_path / name))


def test_missing_file_and_unknown_kind(tmp_path):
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read: No such file"):
        load_text(str(tmp_path / "gone.txt"))
    with pytest.raises(DataError, match=r"novel\.pdf: text must be"):
        load_text("novel.pdf")


def test_hub_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'sa-convert\[datasets\]'"):
        load_text("hub:wikitext")


def fake_datasets(monkeypatch, rows: Iterable[dict]) -> list:
    calls: list = []

    class Module:
        @staticmethod
        def load_dataset(*arguments, **options):
            calls.append((*arguments, options["split"], options["streaming"]))
            return rows

    monkeypatch.setitem(sys.modules, "datasets", Module)
    return calls


def test_hub_names_data_set_config_and_split(monkeypatch):
    calls = fake_datasets(monkeypatch, [{"text": f"row {n}"} for n in range(4)])
    assert len(load_text("hub:org/set:cfg:test").documents) == 4
    load_text("hub:org/set")
    assert calls == [("org/set", "cfg", "test", True), ("org/set", None, "train", True)]
    for wrong in ("hub:", "hub:a::b", "hub:a:b:c:d"):
        with pytest.raises(DataError, match="write hub:DATASET"):
            load_text(wrong)


def test_hub_without_a_text_column(monkeypatch):
    fake_datasets(monkeypatch, [{"content": "x", "id": 3}])
    with pytest.raises(DataError, match="its columns: content, id"):
        load_text("hub:org/set")


def test_token_sequences_are_the_documents_in_order():
    tokens = token_sequences(CharacterTokenizer(False), text_of("abcd", "efgh", "ijkl"), 2, 5)
    assert ["".join(map(chr, row)) for row in tokens.tolist()] == ["abcde", "fghij"]


def test_every_sequence_starts_as_the_tokenizer_starts_a_text():
    tokens = token_sequences(CharacterTokenizer(True), text_of("abcdefgh"), 2, 4)
    assert tokens.tolist() == [[1, *map(ord, "abc")], [1, *map(ord, "def")]]


def test_short_and_empty_texts():
    with pytest.raises(DataError, match=r"8 tokens are too few for 3 sequences of 4 tokens, which need 12"):
        token_sequences(CharacterTokenizer(False), text_of("abcdefgh"), 3, 4)
    with pytest.raises(DataError, match="empty"):
        token_sequences(CharacterTokenizer(False), text_of(""), 3, 4)
