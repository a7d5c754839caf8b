"""Text of domains that the calibration has never seen, out of one wheel on PyPI, and text of its own domain.

The wheel of gensim carries test data: news items of the Australian Broadcasting Corporation (the "Lee background
corpus") and articles of the English Wikipedia in wikitext. Nothing of it is installed or run.
"""

import bz2
import hashlib
import html
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sa_convert.measure.quality.gate import KINDS
from sa_convert.models.tokens import token_sequences
from sa_convert.texts.text import Document, Text, load_text

WHEEL = "gensim==4.4.0"
SHA256 = "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8"
# One file for everyone, whatever Python and machine it is fetched on: it is read, not installed.
PLATFORM = ("--python-version", "3.11", "--implementation", "cp", "--platform", "manylinux_2_28_x86_64")
NEWS = "gensim/test/test_data/lee_background.cor"
ENCYCLOPAEDIA = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"

NEWS_SKIPPED = 150
"""Items at the start, on which search and refit were developed."""

PASSAGE = 2500
"""Characters of an encyclopaedia article, about one sequence, so that sequences are of different articles."""

SEQUENCES = {"news": 24, "encyclopaedia": 24, "built-in": 8}
LENGTH = 512
OUT_OF_DOMAIN = ("news", "encyclopaedia")
IN_DOMAIN = "built-in"


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sa-convert-benchmarks"


def fetch(cache: Path) -> Path:
    """The wheel, downloaded by pip unless the cache has it. Exits if it is not the file that was meant."""
    cache.mkdir(parents=True, exist_ok=True)
    pattern = WHEEL.replace("==", "-") + "-*.whl"
    if not list(cache.glob(pattern)):
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *PLATFORM]
        subprocess.run([*download, "-d", str(cache), WHEEL], check=True)
    wheel = next(cache.glob(pattern))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{wheel} has the SHA-256 {found}, but should have {SHA256}: delete it and start again.")
    return wheel


def domains(tokenizer: Any, cache: Path) -> dict[str, Any]:
    """Tokens (SEQUENCES[name], LENGTH) of each domain: news, encyclopaedia, and the built-in text's validation part."""
    with zipfile.ZipFile(fetch(cache)) as wheel:
        news = wheel.read(NEWS).decode().splitlines()[NEWS_SKIPPED:]
        dump = bz2.decompress(wheel.read(ENCYCLOPAEDIA)).decode()
    texts = {
        "news": _text("news", news),
        "encyclopaedia": _text("encyclopaedia", articles(dump)),
        "built-in": load_text("builtin").split("validation", KINDS),
    }
    return {name: token_sequences(tokenizer, text, SEQUENCES[name], LENGTH) for name, text in texts.items()}


def _text(name: str, documents: Iterator[str] | list[str]) -> Text:
    return Text(name, tuple(Document(f"{text}\n\n", "text", "validation") for text in documents))


def articles(dump: str) -> Iterator[str]:
    """The first PASSAGE characters or so of running prose of every article that has as much, in the dump's order."""
    for source in re.findall(r"<text[^>]*>(.*?)</text>", dump, re.DOTALL):
        passage = ""
        for paragraph in _prose(html.unescape(source)):
            passage += f"{paragraph}\n\n"
            if len(passage) >= PASSAGE:
                yield passage[: passage.rfind(" ", 0, PASSAGE)]
                break


def _prose(wikitext: str) -> Iterator[str]:
    """Paragraphs of at least 200 characters; no templates, tables, references, lists and headings."""
    text = re.sub(r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>|<math.*?</math>", "", wikitext, flags=re.DOTALL)
    for opening, closing in (("{{", "}}"), ("{|", "|}")):
        text = _without(text, opening, closing)
    text = re.sub(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\]]*\]\])*\]\]", "", text)
    text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+\s?([^\]]*)\]|<[^>]+>|'{2,}", r"\1", text)
    for line in text.splitlines():
        line = re.sub(r"\s+", " ", html.unescape(line)).replace("()", "").strip()
        if len(line) >= 200 and line[0].isalnum():
            yield line


def _without(text: str, opening: str, closing: str) -> str:
    """The text without what stands between such brackets, which may be nested."""
    kept, depth = [], 0
    for part in re.split(f"({re.escape(opening)}|{re.escape(closing)})", text):
        if part == opening:
            depth += 1
        elif part == closing:
            depth = max(0, depth - 1)
        elif not depth:
            kept.append(part)
    return "".join(kept)
