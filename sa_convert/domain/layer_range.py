"""A range of layers as recipes write it, by number or by depth."""

import re
from dataclasses import dataclass
from fractions import Fraction

from sa_convert.console.amounts import format_percent

_LAYERS = re.compile(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*")
_DEPTHS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%(?:\s*-\s*(\d+(?:\.\d+)?)\s*%)?\s*")


@dataclass(frozen=True)
class LayerRange:
    """Layers first to last, both included: numbers, or with `by_depth` fractions of the depth from 0 to 1."""

    first: Fraction
    last: Fraction
    by_depth: bool = False

    @classmethod
    def parse(cls, value: object) -> "LayerRange":
        """From 27, "27-30" or "84%-94%". Raises ValueError."""
        if isinstance(value, cls):
            return value
        text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
        for pattern, divisor in ((_LAYERS, 1), (_DEPTHS, 100)):
            match = pattern.fullmatch(text)
            if match:
                first, last = Fraction(match[1]) / divisor, Fraction(match[2] or match[1]) / divisor
                if first > last:
                    raise ValueError(f"{text} runs backwards; write the smaller number first")
                if divisor == 100 and last > 1:
                    raise ValueError(f"{text} goes beyond 100% of the depth")
                return cls(first, last, divisor == 100)
        raise ValueError(f"{value!r} is not a range of layers; write 27-30, 27, or fractions of the depth, 84%-94%")

    def __str__(self) -> str:
        ends = [format_percent(float(end)) if self.by_depth else str(end) for end in (self.first, self.last)]
        return ends[0] if self.first == self.last else "-".join(ends)
