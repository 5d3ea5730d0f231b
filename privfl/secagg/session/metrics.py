"""Metrics as integers on a fine grid, which are summed exactly; each takes several values of a
contribution.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from privfl.errors import PrivflError
from privfl.secagg.layout import Layout
from privfl.secagg.packing import join, limb_count, split
from privfl.secagg.parameters import Parameters

# Metrics are multiples of 2^-30 whose sums are below 2^32 in size, modulo 2^64 on this grid.
_METRIC_GRID, _LARGEST_METRIC = 2.0**-30, 2.0**32


def limbs(parameters: Parameters) -> int:
    """How many values of a contribution hold one number modulo 2^64."""
    return limb_count(64, parameters.value_bits - 1)


def metrics_to_integers(numbers: NDArray[np.float64], parameters: Parameters) -> NDArray[np.int64]:
    """Metrics as integers: multiples of 2^-30, rounded; same shape.

    Args:
        numbers: One site's metrics, each at most 2^32 / members in size; shape (numbers,).
        parameters: Those of the sum.

    Raises:
        PrivflError: If a number is NaN, infinite or too large.
    """
    if not (np.abs(numbers) <= _LARGEST_METRIC / parameters.members).all():
        raise PrivflError(
            "a metric returned NaN, an infinite number, or one too large to be summed over the "
            "sites"
        )
    return np.rint(numbers / _METRIC_GRID).astype(np.int64)


def metrics_from_totals(totals: NDArray[np.int64], parameters: Parameters) -> NDArray[np.float64]:
    """The sums of metrics that sums of limbs hold; shape (numbers,).

    Args:
        totals: The decrypted sums of the limbs; shape (numbers * limbs,).
        parameters: Those of the sum.
    """
    wrapped = [
        total % (1 << 64)
        for total in join(totals.tolist(), parameters.value_bits - 1, limbs(parameters))
    ]
    return np.array(wrapped, dtype=np.uint64).view(np.int64).astype(np.float64) * _METRIC_GRID


def layout_of(numbers: int, parameters: Parameters, *, wide: bool) -> Layout:
    """The layout of contributions of ``numbers`` numbers.

    Args:
        numbers: How many there are.
        parameters: Those of the sum.
        wide: Whether they are numbers modulo 2^64, as metrics are, of which each takes
            :func:`limbs` values.
    """
    return Layout(numbers * limbs(parameters) if wide else numbers, parameters)


def to_limbs(numbers: NDArray[np.uint64], parameters: Parameters) -> NDArray[np.int64]:
    """Numbers modulo 2^64 as values of a contribution; shape (numbers * limbs,)."""
    return split(numbers, parameters.value_bits - 1, limbs(parameters)).view(np.int64)
