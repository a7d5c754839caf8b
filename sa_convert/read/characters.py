"""JSON text that decodes to no Unicode text."""

import json
import re
from typing import Any

_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""How JSON writes half of a character; two of them in a row make a whole one."""


def check_characters(text: str, content: Any) -> None:
    r"""Raises UnicodeEncodeError, a ValueError, if JSON that was read from `text` holds half of a character ("\ud800").

    Python reads such text, but no file can hold it and no terminal can show it.
    """
    if _HALF.search(text):
        json.dumps(content, ensure_ascii=False).encode("utf-8")
