"""Stage 1: vectors to integers of ``value_bits`` bits, and sums of integers back to numbers.

The first stages hold integers as float64, in which every integer below 2^53 is exact and arithmetic
is fastest.
"""

from __future__ import annotations

import os
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from privfl.errors import PrivflError
from privfl.secagg.keystream import KEY_BYTES, Keystream
from privfl.secagg.parameters import Parameters

Rounding = Literal["nearest", "stochastic"]
# Work on pieces that stay in the processor's cache.
_PIECE = 1 << 14
# Far from the ends of float64, at which grids and sums would be infinite or zero.
LEAST_RANGE, LARGEST_RANGE = 2.0**-256, 2.0**256


class Quantiser(Protocol):
    """Makes the numbers of a vector integers, and sums of integers numbers again."""

    def check(self, vector: NDArray[np.generic]) -> None:
        """Refuse a vector that cannot be summed, before anything of it leaves; shape (values,).

        Raises:
            PrivflError: If an element cannot become an integer of the sum; it says why.
        """
        ...

    def integers(self, values: NDArray[np.generic]) -> NDArray[np.float64] | NDArray[np.int64]:
        """The integers of a piece of a checked vector; same shape."""
        ...

    def numbers(self, totals: NDArray[np.int64]) -> NDArray[np.generic]:
        """The numbers behind sums of integers; same shape, and perhaps the same memory."""
        ...


class BoundedIntegers:
    """For vectors of integers, which must not be larger than a value of the sum can be."""

    def __init__(self, parameters: Parameters) -> None:
        self._limit = parameters.largest_value
        self._bits = parameters.value_bits

    def check(self, vector: NDArray[np.generic]) -> None:
        if vector.size and not (-self._limit <= vector.min() and vector.max() <= self._limit):
            raise PrivflError(
                f"a vector to be summed has integers beyond {self._limit}, the largest of "
                f"{self._bits} bits; raise value_bits (28 at most), or sum parts"
            )

    def integers(self, values: NDArray[np.generic]) -> NDArray[np.float64]:
        return values.astype(np.float64)

    def numbers(self, totals: NDArray[np.int64]) -> NDArray[np.int64]:
        return totals


class WrappingIntegers:
    """For vectors of integers that may be larger than a value of the sum: they wrap instead of
    being refused, because a refusal, as a clipped value, would depend on the records.

    The sum is exact if every value and every total fits a field of w bits, which is wider than
    ``value_bits``. A total that does not fit its field wraps, and then does not fit the checksum.
    """

    # The checksum takes integers below this.
    _MOST = 1 << 38

    def check(self, vector: NDArray[np.generic]) -> None:
        if vector.size and not (vector.min() > -self._MOST and vector.max() < self._MOST):
            raise PrivflError(
                "a sum is thousands of times beyond its public range; raise "
                "secure_aggregation.range"
            )

    def integers(self, values: NDArray[np.generic]) -> NDArray[np.int64]:
        return values.astype(np.int64, copy=False)

    def numbers(self, totals: NDArray[np.int64]) -> NDArray[np.int64]:
        return totals


class FixedPoint:
    """For vectors of numbers in a public range, which are rounded to a grid.

    x becomes round(x / g), with g = range / (2^(b-1) - 1). The error of a sum of n values is at
    most n g / 2 with ``nearest`` rounding. With ``stochastic`` rounding it is at most n g, with
    mean zero: x becomes floor(x / g + u), u uniform on [0, 1) under a key from the operating
    system's randomness.

    Args:
        parameters: Those of the sum.
        value_range: The public range: values are between -value_range and value_range.
        rounding: 'nearest' or 'stochastic'.

    Attributes:
        value_range: The public range.
        grid: g, the distance of neighbouring points of the grid.

    Raises:
        PrivflError: If ``value_range`` is not between 2^-256 and 2^256.
    """

    def __init__(
        self, parameters: Parameters, value_range: float, rounding: Rounding = "nearest"
    ) -> None:
        if not LEAST_RANGE <= value_range <= LARGEST_RANGE:
            raise PrivflError(
                f"the public range of a sum must be between {LEAST_RANGE:.3g} and "
                f"{LARGEST_RANGE:.3g}, got {value_range:g}"
            )
        self.value_range = value_range
        self.grid = value_range / parameters.largest_value
        self._limit = float(parameters.largest_value)
        self._dither = Keystream(os.urandom(KEY_BYTES)) if rounding == "stochastic" else None

    def check(self, vector: NDArray[np.generic]) -> None:
        # NaN makes both comparisons false, so one pass answers for NaN, infinity and range.
        if vector.size and not (
            float(vector.min()) >= -self.value_range and float(vector.max()) <= self.value_range
        ):
            if not np.isfinite(vector).all():
                raise PrivflError("a vector to be summed contains NaN or infinite values")
            # The sentence crosses the wire in the clear, so it does not say by how much.
            raise PrivflError(
                f"a vector to be summed has values beyond the public range {self.value_range:g}; "
                "raise the range, which makes the grid coarser"
            )

    def integers(self, values: NDArray[np.generic]) -> NDArray[np.float64]:
        scaled: NDArray[np.float64] = np.multiply(values, 1.0 / self.grid, dtype=np.float64)
        if self._dither is None:
            np.rint(scaled, out=scaled)
        else:
            words = self._dither.words(scaled.size) >> np.uint64(11)
            scaled += words.astype(np.float64) * 2.0**-53
            np.floor(scaled, out=scaled)
            # 1 / g is rounded itself, so that at the end of the range the floor may be one unit too
            # large.
            np.minimum(scaled, self._limit, out=scaled)
        return scaled

    def numbers(self, totals: NDArray[np.int64]) -> NDArray[np.float64]:
        # In the same memory, piece by piece: for large vectors new pages cost more time than the
        # arithmetic.
        numbers = totals.view(np.float64)
        for start in range(0, len(totals), _PIECE):
            piece = slice(start, start + _PIECE)
            numbers[piece] = totals[piece].astype(np.float64) * self.grid
        return numbers
