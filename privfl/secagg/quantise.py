"""Stage 1: vectors to integers of ``value_bits``, and sums of integers back to numbers.

Integers travel through the first stages as float64, in which every integer below 2^53 is exact and
arithmetic is fastest.
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
# Far from the ends of float64, where grids and sums would be infinite or zero.
LEAST_RANGE, LARGEST_RANGE = 2.0**-256, 2.0**256


class Quantiser(Protocol):
    """How numbers become integers and sums of integers become numbers again."""

    def check(self, vector: NDArray[np.generic]) -> None:
        """Refuse a vector that does not fit, before anything of it leaves.

        Raises:
            PrivflError: naming what does not fit.
        """
        ...

    def integers(self, values: NDArray[np.generic]) -> NDArray[np.float64] | NDArray[np.int64]:
        """A piece of a checked vector as integers; same shape."""
        ...

    def numbers(self, totals: NDArray[np.int64]) -> NDArray[np.generic]:
        """What sums of integers stand for; same shape, and perhaps the same memory."""
        ...


class BoundedIntegers:
    """int64 in, int64 out."""

    def __init__(self, parameters: Parameters) -> None:
        self._limit = parameters.largest_value
        self._bits = parameters.value_bits

    def check(self, vector: NDArray[np.generic]) -> None:
        if vector.size and not (-self._limit <= vector.min() and vector.max() <= self._limit):
            raise PrivflError(
                f"a vector to be summed has integers beyond {self._limit}, the largest of "
                f"{self._bits} bits; raise value_bits "
                "(28 at most), or sum parts"
            )

    def integers(self, values: NDArray[np.generic]) -> NDArray[np.float64]:
        return values.astype(np.float64)

    def numbers(self, totals: NDArray[np.int64]) -> NDArray[np.int64]:
        return totals


class WrappingIntegers:
    """int64 in, int64 out, for integers that are to wrap and not to be refused: their sum modulo
    2^P is what is exact, not each of them.

    A refusal would depend on the values, and so would a value that is cut. What a sum wraps to is
    off by multiples of its field, and does not fit its checksum.
    """

    # What the checksum takes.
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
    """Numbers of a public range on a grid: x becomes round(x / g), with g = range / (2^(b-1) - 1).

    The error of a sum of n values is at most n g / 2 with ``nearest`` and n g with ``stochastic``
    rounding, whose mean is zero: floor(x / g + u), u uniform on [0, 1) from the operating system's
    randomness.

    Args:
        value_range: the public range; values are between -value_range and value_range.

    Raises:
        PrivflError: a range next to the ends of what float64 can hold.
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
            # By how much it is beyond would be said in the clear to everybody.
            raise PrivflError(
                f"a vector to be summed has values beyond the public range {self.value_range:g}; "
                f"raise the range, which makes the grid coarser"
            )

    def integers(self, values: NDArray[np.generic]) -> NDArray[np.float64]:
        scaled: NDArray[np.float64] = np.multiply(values, 1.0 / self.grid, dtype=np.float64)
        if self._dither is None:
            np.rint(scaled, out=scaled)
        else:
            scaled += (self._dither.words(scaled.size) >> np.uint64(11)).astype(
                np.float64
            ) * 2.0**-53
            np.floor(scaled, out=scaled)
            # At the very end of the range 1 / g is rounded itself, and the floor may be one unit
            # too much.
            np.minimum(scaled, self._limit, out=scaled)
        return scaled

    def numbers(self, totals: NDArray[np.int64]) -> NDArray[np.float64]:
        # In the same memory, piece by piece: large vectors cost more in new pages than in
        # arithmetic.
        found = totals.view(np.float64)
        for start in range(0, len(totals), _PIECE):
            found[start : start + _PIECE] = (
                totals[start : start + _PIECE].astype(np.float64) * self.grid
            )
        return found
