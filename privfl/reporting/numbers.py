"""Numbers as a person sees them. Epsilons are rounded up, never down."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Decimal

from privfl.reporting.schema import Epsilon

# An epsilon above this multiplies what is likely by more than e^100.
MEANINGLESS = 100.0


def meaningless(site: str, epsilon: float) -> str:
    """What to say of an epsilon above :data:`MEANINGLESS`."""
    return (
        f"WARNING: epsilon {up(epsilon)} at {site} bounds nothing that a person would notice; "
        "lower privacy.target_epsilon, or raise privacy.noise_multiplier"
    )


def decimals(epsilon: float, digits: int = 4) -> str:
    """An epsilon with so many decimals, for columns; what rounding left in the seventh digit
    after them is not counted.
    """
    if not math.isfinite(epsilon):
        return "infinite"
    return f"{math.ceil(epsilon * 10**digits - 1e-6) / 10**digits:.{digits}f}"


def up(value: Epsilon, digits: int = 4) -> str:
    """An epsilon with so many digits, rounded up and never down: read back as a number it is not
    below ``value``.
    """
    if value == "infinite" or value == math.inf:
        return "infinite"
    number = Decimal(repr(float(value)))
    if number.is_nan():
        return "unknown"
    if number == 0:
        return "0"
    step = Decimal((0, (1,), number.adjusted() - digits + 1))
    return _written(number.quantize(step, rounding=ROUND_CEILING))


def plain(value: float) -> str:
    """A number that somebody chose, as it was chosen: 3, 0.1, 1e-05."""
    return "unknown" if math.isnan(value) else repr(value).removesuffix(".0")


def _written(number: Decimal) -> str:
    number = number.normalize()
    return f"{number:f}" if -5 <= number.adjusted() < 6 else f"{float(number):.10g}"
