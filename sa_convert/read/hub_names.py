"""How users name models on the Hub: `org/name[@revision]`."""

import re
from dataclasses import dataclass

_REFERENCE = re.compile(r"([A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@(\w[\w./+-]*))?", re.ASCII)


@dataclass(frozen=True)
class HubName:
    """repo: `org/name`. revision: a branch, tag or commit; None: the main branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def hub_name(reference: str) -> HubName | None:
    """The model on the Hub that `reference` may name, or None if it is no such name."""
    found = _REFERENCE.fullmatch(reference)
    if found is None or ".." in reference:
        return None
    return HubName(found[1], found[2])
