"""Noise for the metrics of private evaluation records. The agent adds it, so that no user code can
leave it out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from privfl.noise.randomness import Randomness, gaussian

# Covers what rounding may add: rounding the sums to the grid of metrics, and cutting each record's
# part to length 1.
_MARGIN = 2.0**-10

# By metric: (sums, counts), each with one number for every ratio.
Measured = Mapping[str, tuple[list[float], list[float]]]


def noised(measured: Measured, noise_multiplier: float, randomness: Randomness) -> Measured:
    """Sums and counts of all metrics with Gaussian noise.

    The trainer has cut every record's part of the sums, and of the counts, of each metric to length
    1. So one record changes all of them together by at most sqrt(2 * metrics) in Euclidean length,
    which is the unit of ``noise_multiplier``.

    Guarantee: The result is a release of the Gaussian mechanism with this ``noise_multiplier``
        (the event :class:`MetricRelease`), if every record's parts were cut as said. Floating-point
        noise is not hardened against attacks on its low-order bits; see :func:`gaussian`.

    Args:
        measured: by metric, its sums and counts, each with one number for every ratio.
        noise_multiplier: standard deviation of the noise in the unit above.
        randomness: the source of the noise.

    Returns:
        The same metrics, with as many sums and counts each.
    """
    deviation = noise_multiplier * math.sqrt(2 * len(measured)) * (1.0 + _MARGIN)
    with_noise = {}
    for name, (sums, counts) in measured.items():
        noise = gaussian(len(sums) + len(counts), deviation, randomness).tolist()
        values = [value + extra for value, extra in zip([*sums, *counts], noise, strict=True)]
        with_noise[name] = (values[: len(sums)], values[len(sums) :])
    return with_noise
