"""Keeps tokens and passwords out of messages."""

import os
import re
import sys

_KINDS = (
    (re.compile(r"hf_[A-Za-z0-9]{16,}"), "hf_***"),
    (re.compile(r"(?i)(bearer\s+)\S+"), r"\1***"),
    (re.compile(r"://[^/\s@]+@"), "://***@"),
)
_SHORTEST = 6
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def redact(text: str) -> str:
    """`text` without the Hub token in use, anything that looks like one, and user names and passwords in URLs."""
    tokens = [os.environ.get(variable, "").strip() for variable in _VARIABLES]
    if (hub := sys.modules.get("huggingface_hub")) is not None:
        tokens.append(hub.get_token() or "")
    for token in tokens:
        if len(token) >= _SHORTEST:
            text = text.replace(token, "***")
    for pattern, shown in _KINDS:
        text = pattern.sub(shown, text)
    return text
