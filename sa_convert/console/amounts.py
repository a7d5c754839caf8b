"""Numbers as people write and read them: percentages, sizes, counts."""

import re
from decimal import Decimal

_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


def parse_percent(text: object) -> float:
    """The fraction that "8%" or "8.5 %" means (0.08, 0.085), from 0 to 1.

    A number without the sign could mean 8% or 800%, so it is refused. Raises ValueError with a message for the user.
    """
    if isinstance(text, int | float) and not isinstance(text, bool):
        raise ValueError(f"{text} is not a percentage; write it with a percent sign, such as 5%")
    match = _PERCENT.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"{text!r} is not a percentage from 0% to 100%; write it with a percent sign, such as 5%")
    value = float(Decimal(match[1]) / 100)
    if value > 1:
        raise ValueError(f"{text.strip() if isinstance(text, str) else text} is more than 100%")
    return value


def format_percent(fraction: float) -> str:
    """The shortest text that `parse_percent` reads as the same fraction: 0.08 is "8%"."""
    digits = f"{Decimal(repr(float(fraction))) * 100:f}"
    return f"{digits.rstrip('0').rstrip('.') if '.' in digits else digits}%"


def with_error(text: str, error: float | None, form: str) -> str:
    """A number and its standard error, if it has one: "0.31 ± 0.02"."""
    return text if error is None else f"{text} ± {error:{form}}"


def human_bytes(size: int) -> str:
    """Bytes in decimal units, as the Hub shows them: 269060552 is "269.1 MB"."""
    return _scaled(size, ("B", "kB", "MB", "GB", "TB", "PB"))


def human_count(number: int) -> str:
    """A count in thousands, millions or billions: 134515008 is "134.5 M"."""
    return _scaled(number, ("", "k", "M", "B", "T")).strip()


def _scaled(number: int, units: tuple[str, ...]) -> str:
    if number < 1000:
        return f"{number} {units[0]}"
    value = float(number)
    for unit in units:
        # 999.96 would be shown as 1000.0
        if value < 999.95 or unit == units[-1]:
            return f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")
