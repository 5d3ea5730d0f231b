"""Samples of the discrete Gaussian on the integers, exact up to a proven distance, many at a time. Torch-free.

P(x) is proportional to exp(-x^2 / (2 s^2)) for integer x (Canonne, Kamath, Steinke 2020). Sampling is by rejection from a staircase: the integers
within 12 s of zero are cut into bins of 2^k, a bin j is chosen with probability W_j / (N 2^54) for integer weights W_j, a place in it uniformly,
and x is accepted with probability

    a(x) = c 2^k exp(-x^2 / (2 s^2)) / W_j <= 1,

so that every x within range is put out with probability proportional to exp(-x^2 / (2 s^2)), whatever the weights are.

Distance from the exact distribution, in total variation per sample:

- beyond 12 s: at most 2 exp(-72) < 2^-102 (the discrete Gaussian is sub-Gaussian with parameter s, ibid.);
- the bin: none. Weights are integers that add up to N 2^54, and the alias method (Walker 1977) splits them exactly, so 64 uniform bits choose a
  bin with exactly its probability; k more bits choose the place;
- acceptance: a(x) is known as a float64 whose error is below 2^-40 (an exponent of size at most 150 with a relative error of a few 2^-53, and exp).
  Uniform bits that are further away from it decide; the others, one in 2^28 or fewer, get 128 more bits and are compared with a(x) to 60 digits,
  which leaves at most 2^-128.

Together below 2^-100 per sample, so below 2^-50 for 10^15 samples: what a run adds to delta (times at most 1 + e^epsilon) is smaller than what
floating-point arithmetic prints of it.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal, localcontext

import numpy as np
from numpy.typing import NDArray

from privfl.dp.randomness import Randomness

_COLUMN_BITS, _COLUMNS = 54, 1 << 10
_REACH = 12.0
# Bins to one standard deviation: between this and twice as many, so that nearly all candidates are accepted and all bins fit the table.
_FINENESS = 16
_FLOAT_ERROR = 2.0**-40
_EXTRA_BITS = 128
# Work on pieces that stay in the processor's cache.
_PIECE = 1 << 14


class DiscreteGaussian:
    """Integers with P(x) proportional to exp(-x^2 / (2 deviation^2)).

    Args:
        deviation: s, from 0.5 to 2^40; the standard deviation, but for the narrowest.

    Raises:
        ValueError: another deviation.
    """

    def __init__(self, deviation: float, randomness: Randomness) -> None:
        if not 0.5 <= deviation <= 2.0**40:
            raise ValueError(f"the deviation of a discrete Gaussian must be between 0.5 and 2^40, got {deviation}")
        self._deviation, self._randomness = deviation, randomness
        self._bits = max(0, math.floor(math.log2(deviation / _FINENESS)))
        # Uniform bits for the acceptance; float64 holds 53.
        self._fine_bits = min(53, 64 - self._bits)
        width = 1 << self._bits
        reach = math.ceil(_REACH * deviation / width)
        self.starts = [place * width for place in range(-reach, reach)]
        self.weights, self.scale = _staircase(self.starts, width, deviation)
        own, other = _alias(self.weights)
        logs = [math.log(self.scale) + self._bits * math.log(2.0) - math.log(weight) for weight in self.weights]
        self._thresholds = np.array(own, dtype=np.uint64)
        columns = [min(column, len(self.weights) - 1) for column in range(_COLUMNS)] + other
        self._bins = np.array(columns, dtype=np.int64)
        self._offsets = np.array(self.starts, dtype=np.int64)[self._bins]
        self._logs = np.array(logs)[self._bins]
        self._steepness = 0.5 / deviation / deviation
        self._tolerance = _FLOAT_ERROR + 2.0**-self._fine_bits

    def draw(self, count: int) -> NDArray[np.int64]:
        """``count`` independent samples; shape (count,)."""
        found = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            # Some more than are missing: about one in thirty is rejected.
            wanted = min(_PIECE, count - done + (count - done) // 16 + 16)
            accepted = self._candidates(wanted)[: count - done]
            found[done : done + len(accepted)] = accepted
            done += len(accepted)
        return found

    def _candidates(self, count: int) -> NDArray[np.int64]:
        """The accepted ones of ``count`` candidates."""
        words = np.frombuffer(self._randomness.bytes(16 * count), dtype=np.uint64)
        choice, place = words[:count], words[count:]
        column = (choice >> np.uint64(_COLUMN_BITS)).view(np.int64)
        rest = choice & np.uint64((1 << _COLUMN_BITS) - 1)
        entry = column + _COLUMNS * (rest >= self._thresholds[column])
        x = self._offsets[entry] + (place & np.uint64((1 << self._bits) - 1)).view(np.int64)
        chance = x.astype(np.float64)
        chance *= chance
        chance *= -self._steepness
        chance += self._logs[entry]
        np.exp(chance, out=chance)
        uniform = (place >> np.uint64(64 - self._fine_bits)).astype(np.float64)
        uniform *= 2.0**-self._fine_bits
        chance -= uniform
        accepted = chance > self._tolerance
        open_ones = np.flatnonzero(np.abs(chance) <= self._tolerance)
        for i in open_ones.tolist():
            accepted[i] = self._accepts(int(x[i]), int(self._bins[entry[i]]), int(place[i]) >> (64 - self._fine_bits))
        return x[accepted]

    def _accepts(self, x: int, place: int, first_bits: int) -> bool:
        """Whether a uniform number that begins with ``first_bits`` is below a(x), by 128 more bits and 60 digits."""
        more = int.from_bytes(self._randomness.bytes(_EXTRA_BITS // 8), "little")
        uniform = (first_bits << _EXTRA_BITS) + more
        with localcontext(Context(prec=80)):
            exponent = -(Decimal(x) ** 2) / (2 * Decimal(self._deviation) ** 2)
            chance = Decimal(self.scale) * (1 << self._bits) / self.weights[place] * exponent.exp()
            return Decimal(uniform) < chance * (1 << (self._fine_bits + _EXTRA_BITS))


def _staircase(starts: list[int], width: int, deviation: float) -> tuple[list[int], float]:
    """Integer weights of the bins, adding up to the size of the table, and c: a(x) is then at most 1 everywhere."""
    nearest = [start if start >= 0 else start + width - 1 for start in starts]
    heights = [math.exp(-0.5 * (x / deviation) ** 2) for x in nearest]
    size, total = _COLUMNS << _COLUMN_BITS, math.fsum(heights)
    weights = [max(1, math.ceil(height / total * size)) for height in heights]
    weights[weights.index(max(weights))] -= sum(weights) - size
    # Heights are off by rounding, far less than what is taken off here.
    scale = min(weight / (height * width) for weight, height in zip(weights, heights, strict=True) if height > 0.0)
    return weights, scale * (1.0 - _FLOAT_ERROR)


def _alias(weights: list[int]) -> tuple[list[int], list[int]]:
    """Walker's tables in exact arithmetic: of each column the part that is its own bin's, and the bin that has the rest."""
    full = 1 << _COLUMN_BITS
    left = weights + [0] * (_COLUMNS - len(weights))
    own, other = [full] * _COLUMNS, [0] * _COLUMNS
    small = [i for i, weight in enumerate(left) if weight < full]
    large = [i for i, weight in enumerate(left) if weight > full]
    while small:
        little, big = small.pop(), large[-1]
        own[little], other[little] = left[little], big
        left[big] -= full - left[little]
        if left[big] <= full:
            large.pop()
            if left[big] < full:
                small.append(big)
    return own, other
