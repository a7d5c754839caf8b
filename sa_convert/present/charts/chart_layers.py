"""Layers on the axes of charts: those with softmax attention side by side, stack by stack."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sa_convert.domain.analysis import Analysis
from sa_convert.domain.stacks import in_stack, stack_ranges

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NARROW = 0.25
"""The part of all layers below which the name of a stack may be wider than its layers."""

NUMBER_ROOM, NAME_ROOM = 16, 12
"""Points beside an axis that the numbers of layers take, and a name of a stack."""


def shown_layers(analysis: Analysis) -> list[int]:
    """The layers that charts show, in order; their places on an axis are 0, 1, ..."""
    return [layer for layer, heads in enumerate(analysis.heads) if heads]


def shown_stacks(analysis: Analysis) -> list[tuple[str, range]]:
    """Name and places of each stack."""
    found, first = [], 0
    for name, members in stack_ranges(analysis.stacks, len(analysis.heads)):
        count = sum(analysis.heads[layer] > 0 for layer in members)
        found.append((name, range(first, first + count)))
        first += count
    return found


def layer_axis(axis: Any, analysis: Analysis) -> None:
    """Numbers of layers, and the room of all that are shown, on an x or y axis of matplotlib. Stacks count from 0 each,
    with their names beside and lines between."""
    from matplotlib.ticker import MaxNLocator

    layers = shown_layers(analysis)
    axis.axes.set(**{f"{axis.axis_name}lim": (-0.5, len(layers) - 0.5)})
    if layers == list(range(len(layers))) and not analysis.stacks:
        axis.set_major_locator(MaxNLocator(nbins=min(len(layers), 12), integer=True))
        return
    step = next(step for step in (1, 2, 5, 10, 20, len(layers)) if len(layers) <= 16 * step)
    stacks = shown_stacks(analysis)
    places = [place for _, members in stacks for place in members[::step]]
    axis.set_ticks(places, labels=[str(in_stack(analysis.stacks, layers[place]).number) for place in places])
    if analysis.stacks:
        # In two rows if they might overlap.
        rows = 2 if min(len(members) for _, members in stacks) < NARROW * len(layers) else 1
        for number, (name, members) in enumerate(stacks):
            _name_stack(axis, name, (members[0] + members[-1]) / 2, NUMBER_ROOM + number % rows * NAME_ROOM)
        axis.labelpad = rows * NAME_ROOM + 8
        separate_stacks(axis, analysis)


def _name_stack(axis: Any, name: str, centre: float, distance: float) -> None:
    """The name of a stack between the numbers of its layers and the name of the axis. distance: points."""
    axes = axis.axes
    if axis.axis_name == "x":
        place: dict[str, Any] = {"xy": (centre, 0), "xycoords": axes.get_xaxis_transform(), "xytext": (0, -distance)}
        place |= {"ha": "center", "va": "top"}
    else:
        place = {"xy": (0, centre), "xycoords": axes.get_yaxis_transform(), "xytext": (-distance - 5, 0)}
        place |= {"ha": "right", "va": "center", "rotation": 90}
    axes.annotate(name, textcoords="offset points", fontsize=9, annotation_clip=False, **place)


def separate_stacks(axis: Any, analysis: Analysis) -> None:
    """Lines across an x or y axis between the layers of different stacks."""
    line = axis.axes.axvline if axis.axis_name == "x" else axis.axes.axhline
    for _, members in shown_stacks(analysis)[1:]:
        line(members[0] - 0.5, color="#444444", linewidth=0.8)


def plot_layers(axes: "Axes", analysis: Analysis, values: Sequence[float | None], style: str, **look: Any) -> None:
    """A line for each stack through the layers that have a value. values: one for each layer of the model."""
    layers = shown_layers(analysis)
    for _, members in shown_stacks(analysis):
        points = [(place, value) for place in members if (value := values[layers[place]]) is not None]
        axes.plot([place for place, _ in points], [value for _, value in points], style, **look)
        look.pop("label", None)  # one entry of the legend is enough
