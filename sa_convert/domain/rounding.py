"""Numbers in JSON: the digits that mean something."""

import math


def digits(value: float | None) -> float | None:
    """Six digits; None for what JSON has no number for."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
