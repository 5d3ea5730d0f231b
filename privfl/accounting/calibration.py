"""How much noise a target needs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

# Less noise bounds nothing. Noise of sixteen thousand times the clipping norm drowns even a million
# records a step.
LEAST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER = 0.01, 2.0**14
# Noise multipliers are whole numbers of these, so that the value on screen is the value used.
_GRID = 1e4


def least_noise_multiplier(epsilon: Callable[[float], float], target: float) -> float | None:
    """The smallest noise multiplier, rounded up to four decimals, of which ``epsilon`` is at
    most ``target``.

    Args:
        epsilon: from a noise multiplier to an epsilon that falls with it.

    Returns:
        None if not even ``LARGEST_NOISE_MULTIPLIER`` reaches the target.

    Example:
        >>> from privfl.accounting import Gaussian, epsilon_of, least_noise_multiplier
        >>> def epsilon(noise_multiplier):
        ...     release = Gaussian(noise_multiplier=noise_multiplier, steps=100)
        ...     return epsilon_of([release], 1e-5).upper
        >>> least_noise_multiplier(epsilon, 2.0)
        21.4912
    """
    from scipy.optimize import brentq

    @functools.cache
    def at(place: int) -> float:
        return epsilon(place / _GRID)

    def excess(logarithm: float) -> float:
        # Between places of the grid the curve is not needed; a step function has the same root.
        return math.log(max(at(round(math.exp(logarithm))), 1e-300) / target)

    high = int(_GRID)
    while at(high) > target:
        if high >= LARGEST_NOISE_MULTIPLIER * _GRID:
            return None
        high *= 2
    low = high // 2
    while low and at(low) <= target:
        high, low = low, low // 2
    if low and math.isfinite(at(low)):
        # The curve is smooth, nearly a line in logarithms: a third of the looks that halving would
        # take.
        high = round(
            math.exp(brentq(excess, math.log(low), math.log(high), xtol=0.2 / high, rtol=1e-15))
        )
        low = high
        step = 1
        while at(high) > target:
            high, step = high + step, 2 * step
        step = 1
        while low > 0 and at(low) <= target:
            low, step = max(0, low - step), 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle) <= target else (middle, high)
    return high / _GRID
