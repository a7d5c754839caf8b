"""How much of the budget of a healing is used, and the learning rate that goes with it."""

import math
import time
from dataclasses import dataclass, field

import torch

WARM_UP = 0.1


def time_left(minutes: float | None, spent: float) -> float | None:
    """Seconds that are left to train of a budget in minutes, one at least, if so many went before; None: no limit."""
    return None if minutes is None else max(60 * minutes - spent, 1.0)


@dataclass
class Clock:
    """steps: of the whole run, None if only time ends it. limit: seconds, None if only tokens end it.

    earlier: seconds of runs that were interrupted. All processes go by the time of the first.
    """

    steps: int | None
    limit: float | None
    earlier: float = 0.0
    _started: float = field(default_factory=time.monotonic)
    _noted: float = 0.0

    @property
    def seconds(self) -> float:
        return self.earlier + time.monotonic() - self._started

    def note(self, device: torch.device) -> None:
        """What time it is, once a step and for all processes alike."""
        self._noted = self.seconds
        if self.limit is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
            told = torch.tensor([self._noted], dtype=torch.float32, device=device)
            torch.distributed.broadcast(told, 0)
            self._noted = float(told)

    def used(self, step: int) -> float:
        """The part of the budget that is used after so many steps, 0 to 1."""
        parts = [step / self.steps] if self.steps else []
        parts += [self._noted / self.limit] if self.limit else []
        return min(1.0, max(parts))

    def rate(self, step: int) -> float:
        """The part of the peak learning rate for the step after so many: up in a line, then down by a cosine."""
        used = self.used(step) + (0.5 / self.steps if self.steps else 0.0)
        if used < WARM_UP:
            return max(used, 1e-3) / WARM_UP
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (used - WARM_UP) / (1 - WARM_UP))))
