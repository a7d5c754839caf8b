"""Text from files that others have written, as a terminal may show it."""

LONGEST = 3000
"""Characters of a message. The longest of ours lists the supported types of models, in some 1,700."""

_END = 700
"""Characters that stay of the end of a longer message, since the last words say what to do."""


def printable(text: str) -> str:
    r"""The text with an escape (\x1b) for each character that would move the cursor, or colour or turn what follows."""
    if text.isprintable():
        return text
    return "".join(part if part.isprintable() else ascii(part)[1:-1] for part in text)


def one_line(text: str) -> str:
    """A message as one printable line of bounded length: of a long one the middle goes."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST - _END - 5]} ... {line[-_END:]}"
