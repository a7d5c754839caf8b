"""JSON files that people can read: short lists are on one line."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PAIR = r"(?:null|\[\d+, \d+\])"


def write_json(content: Mapping[str, Any], file: Path) -> Path:
    """Write an object; equal ones give equal bytes. Raises ValueError for a number that JSON does not have."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    file.write_text(_rows_on_one_line(text) + "\n", encoding="utf-8", newline="\n")
    return file


def _rows_on_one_line(text: str) -> str:
    """JSON with each row of a matrix or of a plan on one line. No string holds a line break."""

    def joined(row: re.Match[str]) -> str:
        return "[" + re.sub(r"\n\s+", " ", row[1]) + "]"

    text = re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", joined, text)
    return re.sub(rf"\[\n\s+({_PAIR}(?:,\n\s+{_PAIR})*)\n\s+\]", joined, text)
