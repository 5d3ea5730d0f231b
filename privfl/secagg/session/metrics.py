"""Metrics as integers: exact sums of numbers on a fine grid, each as several values of a
contribution.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from privfl.errors import PrivflError
from privfl.secagg.layout import Layout
from privfl.secagg.packing import join, limb_count, split
from privfl.secagg.parameters import Parameters

# Metrics are summed exactly as multiples of 2^-30 below 2^32 in size, each as several values.
_METRIC_GRID, _LARGEST_METRIC = 2.0**-30, 2.0**32


def limbs(parameters: Parameters) -> int:
    return limb_count(64, parameters.value_bits - 1)


def metrics_to_integers(numbers: NDArray[np.float64], parameters: Parameters) -> NDArray[np.int64]:
    """Numbers of at most 2^32 / members in size on the grid of metrics.

    Raises:
        PrivflError: a number is not finite or too large.
    """
    if not (np.abs(numbers) <= _LARGEST_METRIC / parameters.members).all():
        raise PrivflError(
            "a metric returned NaN, an infinite number, or one too large to be summed over the "
            "sites"
        )
    return np.rint(numbers / _METRIC_GRID).astype(np.int64)


def metrics_from_totals(totals: NDArray[np.int64], parameters: Parameters) -> NDArray[np.float64]:
    """The sums of numbers behind the sums of their limbs."""
    wrapped = [
        total % (1 << 64)
        for total in join(totals.tolist(), parameters.value_bits - 1, limbs(parameters))
    ]
    return np.array(wrapped, dtype=np.uint64).view(np.int64).astype(np.float64) * _METRIC_GRID


def layout_of(numbers: int, parameters: Parameters, *, wide: bool) -> Layout:
    """Where a vector of so many numbers lies in the blocks of a contribution.

    Args:
        wide: whether each number is one modulo 2^64 that takes several values, as those of metrics
            do.
    """
    return Layout(numbers * limbs(parameters) if wide else numbers, parameters)


def to_limbs(numbers: NDArray[np.uint64], parameters: Parameters) -> NDArray[np.int64]:
    """Each number modulo 2^64 as the values of a contribution; shape (numbers * limbs,)."""
    return split(numbers, parameters.value_bits - 1, limbs(parameters)).view(np.int64)
