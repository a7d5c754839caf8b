"""What windows cost a KV group, from one pass over each long sequence.

Let g[h, t] be the gradient of a loss at the output of head h (before the output projection) at token t, p its
probabilities there and v the values. With a window, the head puts out the mean of the v that are in reach, weighted by
p: so the loss changes to first order by

    e[h, t] = sum_in_reach p (v . g) / sum_in_reach p  -  sum_all p (v . g)

and the cost of a unit is 1/2 sum_t (sum_h e[h, t])^2, as for sharing (`sa_convert.treatments.share.cost`). All windows
come of the same two running sums over keys. What probabilities lack to 1 has gone to a learned sink, which stays.

Letters in shape comments: T tokens, H query heads, G KV groups, D head size; B queries of a block, S keys.
"""

from collections.abc import Iterator, Sequence
from copy import copy
from math import copysign
from statistics import stdev
from typing import TYPE_CHECKING

from sa_convert.domain.calibrated import Measure
from sa_convert.domain.plan import Plan
from sa_convert.domain.units import Unit, Units
from sa_convert.models.processes import gathered, merged
from sa_convert.treatments.ledger import Attended, Ledger, Offer, Taken
from sa_convert.treatments.window.rules import WindowLimits

if TYPE_CHECKING:
    import torch

NAME = "window"

SINKS = 4
"""First tokens that are always seen, if nothing says otherwise."""

WINDOWS = (64, 128, 256, 512, 1024)
"""Lengths that may be on offer, of which a search takes those that its calibration tests."""

SEVERAL = 2
"""Sequences that have to repeat after longer than a window before it is on offer."""


class WindowCosts(Ledger):
    """costs: for each unit and window, by the number of the sequence, in nats a token there; slopes: likewise, the part
    of first order, which there is under a plan. weights: of each sequence. repetitions: which of them repeat random
    tokens. windows: on offer, ascending. scales: what costs on repetition are multiplied with, as they were measured.
    emphasis: what they are multiplied with besides, whatever the unit.

    limits: see `WindowLimits`. only: the one window that is on offer; None: all of them.

    Under a plan, changes are those from what a unit sees already.
    """

    long = True

    def __init__(
        self,
        units: Units,
        measure: Measure,
        plan: Plan | None = None,
        known: "WindowCosts | None" = None,
        *,
        limits: WindowLimits | None = None,
    ) -> None:
        """known: costs without a plan, whose scales hold for these, too, as does what is on offer."""
        super().__init__(units, NAME, measure, without_plan=not plan)
        self.limits = limits or WindowLimits()
        self.sinks = SINKS if self.limits.sinks is None else self.limits.sinks
        self.only: int | None = known.only if known else None
        self.scales: dict[Unit, float] = dict(known.scales) if known else {}
        self.emphasis = 1.0
        self.slopes: dict[tuple[Unit, int], dict[int, float]] = {}
        self.windows: tuple[int, ...] = ()
        self.costs: dict[tuple[Unit, int], dict[int, float]] = {}
        self.weights: dict[int, float] = {}
        self.repetitions: set[int] = set()
        self._units: dict[int, list[Unit]] = {}
        for unit in units.all:
            if self.limits.refusal(units.geometry.layers[unit.layer]) is None:
                self._units.setdefault(unit.layer, []).append(unit)

    def tested_by(self, periods: Sequence[int]) -> None:
        self.windows = tuple(
            window
            for window in self.limits.sizes or WINDOWS
            if sum(period > window for period in periods) >= SEVERAL and self.only in (None, window)
        )

    def attend(self, attended: Attended) -> None:
        if attended.layer not in self._units or not self.windows:
            return
        # Windows as wide as the layer's own save nothing there.
        own = self.units.geometry.layers[attended.layer].window
        windows = [window for window in self.windows if own is None or window + self.sinks < own]
        scored = max(1, int(attended.scored[1:].sum()))
        self.weights[attended.sample] = attended.weight * scored
        if attended.repetition:
            self.repetitions.add(attended.sample)
        for start, probabilities in attended.blocks():
            changes = changes_of(attended, start, probabilities, windows, self.sinks)  # (windows, H, B)
            for unit in self._units[attended.layer]:
                e = changes[:, list(unit.heads)].sum(1).double()  # (windows, B)
                costs = e.sum(-1) / scored if attended.slope else e.square().sum(-1) * (0.5 / scored)
                for window, cost in zip(windows, costs.tolist(), strict=True):
                    known = (self.slopes if attended.slope else self.costs).setdefault((unit, window), {})
                    known[attended.sample] = known.get(attended.sample, 0.0) + cost

    def join(self, *, screening: bool = False) -> None:
        self.costs, self.slopes = _of_all(self.costs), _of_all(self.slopes)
        self.weights = dict(sorted(merged(self.weights).items()))
        self.repetitions = {sample for one in gathered(self.repetitions) for sample in one}

    def offers(self, unit: Unit, taken: Taken) -> Iterator[Offer]:
        for window in self.windows:
            if (unit, window) in self.costs:
                yield self.offer(unit, window)

    def best(self, unit: Unit, taken: Taken) -> Offer | None:
        """That of the narrowest window, which saves the most."""
        return next(self.offers(unit, taken), None)

    def offer(self, unit: Unit, window: int) -> Offer:
        """A window of all KV groups of a unit."""
        plan = {group: {NAME: {"sinks": self.sinks, "tokens": window}} for group in unit.groups}
        return Offer(NAME, self.cost(unit, window), 0, plan)

    def cost(self, unit: Unit, window: int, repetition: bool | None = None) -> float:
        """Of a window. repetition: of text or of repetition alone."""
        found, slopes = self.costs.get((unit, window), {}), self.slopes.get((unit, window), {})
        kept = [at for at in found if repetition is None or (at in self.repetitions) == repetition]
        second = sum(self._weight(at) * found[at] * self._scale(unit, at) for at in kept)
        return second + certain([self._weight(at) * slopes[at] for at in kept if at in slopes])

    def alternatives(self) -> "Iterator[WindowCosts]":
        """If all windows of a plan have one length, one for each length."""
        for window in self.windows if self.limits.whole_layers else ():
            other = copy(self)
            other.only, other.windows = window, (window,)
            yield other
        if not self.limits.whole_layers:
            yield self

    def emphasized(self, emphasis: float) -> "WindowCosts":
        other = copy(self)
        other.emphasis = emphasis
        return other

    def _weight(self, sample: int) -> float:
        return self.weights[sample] * (self.emphasis if sample in self.repetitions else 1.0)

    def _scale(self, unit: Unit, sample: int) -> float:
        return self.scales.get(unit, 1.0) if sample in self.repetitions else 1.0

    def value(self, unit: Unit, offer: Offer) -> float:
        return self.cost(unit, self.window_of(offer))

    @staticmethod
    def window_of(offer: Offer) -> int:
        """The tokens of an offer's window."""
        told: int = next(iter(offer.plan.values()))[NAME]["tokens"]
        return told


def _of_all(known: dict[tuple[Unit, int], dict[int, float]]) -> dict[tuple[Unit, int], dict[int, float]]:
    """The same of the sequences of all processes."""
    found: dict[tuple[Unit, int], dict[int, float]] = {}
    for one in gathered(known):
        for key, costs in one.items():
            found.setdefault(key, {}).update(costs)
    return {key: dict(sorted(costs.items())) for key, costs in found.items()}


def certain(slopes: Sequence[float]) -> float:
    """The sum of slopes, one of each sequence, a standard error nearer to 0: a search picks what looks best among
    thousands of choices, which with few sequences is what is noisiest."""
    total = sum(slopes)
    if len(slopes) < 2:
        return total
    error = stdev(slopes) * len(slopes) ** 0.5
    return copysign(max(0.0, abs(total) - error), total)


def changes_of(
    attended: Attended, start: int, probabilities: "torch.Tensor", windows: Sequence[int], sinks: int
) -> "torch.Tensor":
    """e (windows, H, B) of a block of queries. probabilities: (H, B, S), of all keys up to the last query."""
    import torch

    heads, count, length = probabilities.shape
    gradient = attended.gradient[start : start + count].float().transpose(0, 1)  # (H, B, D)
    value = attended.value[:, :length].float()
    value = value.repeat_interleave(heads // value.shape[0], dim=0).to(gradient.device)  # (H, S, D)
    probabilities = probabilities.to(gradient.device)
    weighed = torch.matmul(gradient, value.transpose(1, 2)).mul_(probabilities)  # (H, B, S)
    # Up to and without each key, so that differences are sums over a range.
    mass, moved = (torch.nn.functional.pad(part.cumsum(-1), (1, 0)) for part in (probabilities, weighed))
    rest = (1 - mass[..., -1:]).clamp(min=0)
    place = torch.arange(length - count, length)[:, None]  # of each query
    found = []
    for window in windows:
        first = (place - window + 1).clamp(min=0)  # the first key of the window
        begun = first.clamp(max=sinks)  # sinks that are not in it
        at = torch.cat([begun, first, place + 1], dim=1).to(gradient.device).expand(heads, count, 3)
        sunk, before, all_of = mass.gather(-1, at).unbind(-1)
        inside = sunk + all_of - before
        sunk, before, whole = moved.gather(-1, at).unbind(-1)
        kept = (sunk + whole - before) / (inside + rest[..., 0]).clamp(min=1e-30)
        out_of_reach = (first > begun)[:, 0].to(gradient.device)
        found.append(torch.where(out_of_reach, kept - whole, 0.0))
    return torch.stack(found) if found else torch.zeros(0, heads, count)
