"""What treatments say of a model, as plain data: for `inspect`, report, card, figure and terminal."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Treated:
    """What one treatment has done to a model, in its own words."""

    name: str
    """As recipes call the treatment."""
    label: str
    """As rows of tables call it: "Sharing"."""
    summary: str
    """How much was done: "12 of 90 KV groups borrow, in 4 layers"."""
    rows: tuple[tuple[str, str], ...] = ()
    """Label and text of the lines that a dry run shows."""
    section: Mapping[str, Any] = field(default_factory=dict)
    """Keys and values of report.json."""
    lead: str = ""
    """What comes after "converted so that" in the card, without a full stop."""
    heading: str = ""
    """Of the card's section about it."""
    caption: str = ""
    """What the figure shows, for those who do not see it."""
    table: tuple[str, ...] = ()
    """Lines of the table in that section."""
    remarks: tuple[str, ...] = ()
    """Paragraphs below the table of savings."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """How many KV groups ("groups") and whole layers ("layers") it is done to."""
    used: bool = True
    """Whether the plan uses the treatment; if not, only `section` is told."""


@dataclass(frozen=True)
class Look:
    """How the figure shows a KV group. state: a word for it. colour: "#rrggbb"; ink: of the label on it. meaning: for
    the legend. label: in the cell, of one or two lines. mark: what is drawn in the ink besides, so that it is known in
    grey, too: "edges", "floor", "roof", "diagonal" or "cross"; "": nothing."""

    state: str
    colour: str
    meaning: str
    label: str = ""
    ink: str = "black"
    mark: str = ""


@dataclass(frozen=True)
class Drawing:
    """What a treatment draws into the figure of a plan.

    title: the figure's. note: what labels mean. looks: by layer and KV group. legend: states in the order in which the
    legend has them.
    """

    title: str
    note: str
    looks: Mapping[tuple[int, int], Look]
    legend: tuple[str, ...]


@dataclass(frozen=True)
class Inspected:
    """What `inspect` tells of a treatment. reason: why nothing of the model can be treated so, or None. section: keys
    and values of its JSON. rows: label and text of each line."""

    reason: str | None = None
    section: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[tuple[str, str], ...] = ()
