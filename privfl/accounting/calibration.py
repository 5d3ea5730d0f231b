"""How much noise a target epsilon needs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

# Less noise bounds nothing. Noise of sixteen thousand times the clipping norm drowns even a million
# records a step.
LEAST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER = 0.01, 2.0**14
# Noise multipliers are multiples of 1 / _GRID, so that the value on screen is the value used. The
# search runs over these points, as whole numbers: ``point / _GRID`` is the noise multiplier.
_GRID = 1e4
# From a point to the epsilon of its noise multiplier; never rises.
_Curve = Callable[[int], float]


def least_noise_multiplier(epsilon: Callable[[float], float], target: float) -> float | None:
    """The smallest noise multiplier, a multiple of 10^-4 and at least ``LEAST_NOISE_MULTIPLIER``,
    with which ``epsilon`` is at most ``target``.

    Args:
        epsilon: from a noise multiplier to an epsilon, which never rises with more noise.
        target: the epsilon to reach, above 0.

    Returns:
        The noise multiplier; None if not even ``LARGEST_NOISE_MULTIPLIER`` reaches the target.

    Example:
        >>> from privfl.accounting import Gaussian, epsilon_of, least_noise_multiplier
        >>> def epsilon(noise_multiplier):
        ...     release = Gaussian(noise_multiplier=noise_multiplier, steps=100)
        ...     return epsilon_of([release], 1e-5).upper
        >>> least_noise_multiplier(epsilon, 2.0)
        21.4912
    """

    @functools.cache
    def curve(point: int) -> float:
        return epsilon(point / _GRID) if point >= LEAST_NOISE_MULTIPLIER * _GRID else math.inf

    high = _first_power_that_reaches(curve, target)
    if high is None:
        return None
    low, high = _halved_down(curve, target, high)
    if low and math.isfinite(curve(low)):
        low, high = _around_the_root(curve, target, low, high)
    return _least_point(curve, target, low, high) / _GRID


def _first_power_that_reaches(curve: _Curve, target: float) -> int | None:
    """The first of the noise multipliers 1, 2, 4, ... that reaches the target, as a point."""
    high = int(_GRID)
    while curve(high) > target:
        if high >= LARGEST_NOISE_MULTIPLIER * _GRID:
            return None
        high *= 2
    return high


def _halved_down(curve: _Curve, target: float, high: int) -> tuple[int, int]:
    """(low, high): ``high`` reaches the target, ``low`` is half of it and does not, or is 0."""
    low = high // 2
    while low and curve(low) <= target:
        high, low = low, low // 2
    return low, high


def _around_the_root(curve: _Curve, target: float, low: int, high: int) -> tuple[int, int]:
    """(low, high) close to where the curve crosses the target.

    The curve is smooth, nearly a line in logarithms: a third of the evaluations that halving would
    take.
    """
    from scipy.optimize import brentq

    def excess(logarithm: float) -> float:
        # Between the points of the grid the curve is not needed; a step function has the same root.
        return math.log(max(curve(round(math.exp(logarithm))), 1e-300) / target)

    root = brentq(excess, math.log(low), math.log(high), xtol=0.2 / high, rtol=1e-15)
    low = high = round(math.exp(root))
    step = 1
    while curve(high) > target:
        high, step = high + step, 2 * step
    step = 1
    while low > 0 and curve(low) <= target:
        low, step = max(0, low - step), 2 * step
    return low, high


def _least_point(curve: _Curve, target: float, low: int, high: int) -> int:
    """The least point above ``low`` that reaches the target, by halving; ``high`` does."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if curve(middle) <= target else (middle, high)
    return high
