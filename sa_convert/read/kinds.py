"""What a file is that is not what its name says, by its first bytes."""

_KINDS = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file: run 'git lfs pull' in its folder"),
    (b"PK\x03\x04", "is a zip archive, as PyTorch writes them: give it a name that ends in .bin"),
    (b"GGUF", "is a GGUF file: give it a name that ends in .gguf, and convert that file"),
    (b"<!DOCTYPE", "is a web page: download the file itself"),
    (b"<!doctype", "is a web page: download the file itself"),
    (b"<html", "is a web page: download the file itself"),
)


def other_kind(start: bytes) -> str | None:
    """What a file that begins with these bytes (24 suffice) is and what to do, or None."""
    return next((kind for known, kind in _KINDS if start.startswith(known)), None)
