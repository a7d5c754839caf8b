"""The KV groups that seem to find what was said long ago, windowed for real, one by one.

A few KV groups do most of the retrieving. The estimate ranks them well, and says too little of them: what is lost by
each is measured on repetition, and the estimate of all of its windows grows or falls with that.
"""

from typing import TYPE_CHECKING

from sa_convert.console.progress import progress
from sa_convert.domain.plan import Plan
from sa_convert.domain.units import Unit
from sa_convert.models.processes import in_share, merged, shared
from sa_convert.observe.resumed import Resumed
from sa_convert.treatments.window.cost import WindowCosts

if TYPE_CHECKING:
    from sa_convert.observe.session import Session

TRIED = 20
"""Units that are windowed one by one."""

BOUNDS = (0.25, 16.0)
"""What measured and estimated cost may be to each other: beyond these the one sequence is taken for noise."""


def measure_retrieval(session: "Session", costs: WindowCosts, tried: int = TRIED) -> dict[Unit, float]:
    """Correct the costs of the units that cost most on repetition; return by how much, as measured to estimated.
    Several processes share these units."""
    if session.long is None or not costs.windows or not costs.repetitions:
        return {}
    window = costs.windows[len(costs.windows) // 2]
    units = {unit for unit, at in costs.costs if at == window}
    ranked = sorted(units, key=lambda unit: (-costs.cost(unit, window, repetition=True), unit))[:tried]
    # The sequence that repeats after the longest time that most of its tokens are still scored for.
    number = max(costs.repetitions, key=lambda at: _tests(session, at, costs.windows[-1]))
    found = {}
    with progress(in_share(ranked) + 1, "KV groups one by one", unit="pass") as bar:
        resumed = Resumed(session.probe, session.long.fit[number])
        bar.update()
        for _, unit in shared(ranked):
            estimate = costs.costs[unit, window].get(number, 0.0)
            plan = Plan({unit.layer: costs.offer(unit, window).plan}, session.units.geometry.stacks)
            measured = resumed.divergence(plan)
            bar.update()
            if estimate > 0:
                found[unit] = min(max(measured / estimate, BOUNDS[0]), BOUNDS[1])
    found = merged(found)
    costs.scales.update(found)
    return found


def _tests(session: "Session", number: int, window: int) -> tuple[bool, int]:
    assert session.long is not None
    sample = session.long.fit[number]
    return sample.period > window, sample.tokens_scored
