"""Samples of the discrete Gaussian on the integers, exact up to a proven distance, many at a time.

Torch-free.

P(x) is proportional to h(x) = exp(-x^2 / (2 s^2)) for integer x (Canonne, Kamath, Steinke 2020).
Sampling is by rejection from a staircase: the integers within 12 s of zero are cut into bins of
2^k, bin j is chosen with probability W_j / (N 2^54) for integer weights W_j, a position in it
uniformly, and x is accepted with probability

    a(x) = C h(x) / W_j <= 1

for an integer C, so that every x within range is returned with probability proportional to h(x),
whatever the weights are: rounding, in the choice of W_j and C, costs candidates and never
exactness. Distance from the exact distribution, in total variation per sample, for uniform bits:

- beyond 12 s: at most 2 exp(-72) < 2^-102, since conditioning on a range is as far as the
  probability outside. E exp(tX) is exp(t^2 s^2 / 2) times sum h(x - t s^2) / sum h(x), and that
  ratio is at most 1 (both are the same Fourier series with positive coefficients, at t s^2 and at
  0), so P(|X| >= m) <= 2 exp(-m^2 / (2 s^2)) by Chernoff.
- the bin: none. Weights are integers that add up to N 2^54, and the alias method (Walker 1977)
  splits them exactly, so 64 uniform bits choose a bin with exactly its probability; k more bits
  choose the position.
- a(x) <= 1: C is below W_j / h(x) of the highest x of every bin by at least 1/2, computed to 60
  digits, which no rounding makes up for.
- acceptance: x is accepted if f + 128 uniform bits, read as U in [0, 1), are below a(x) to 80
  digits (relative error below 10^-76), which is within 2^-155 of a(x) as f >= 28. Nine candidates
  in ten or more are accepted, so it adds less than 2^-154.
- floating point: none. A float64 of a(x) only decides where the first f bits leave no doubt
  (`_FLOAT_ERROR`), as all f + 128 would.

Together below 2^-100 per sample, so below 2^-50 for 10^15 samples: what a run adds to delta (times
at most 1 + e^epsilon) is smaller than what floating-point arithmetic prints of it. The number of
rejections before a sample is independent of the sample.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal, localcontext

import numpy as np
from numpy.typing import NDArray

from privfl.noise.randomness import Randomness

_COLUMN_BITS, _COLUMNS = 54, 1 << 10
_REACH = 12.0
# Bins to one standard deviation: between this and twice as many, so that nearly all candidates are
# accepted and all bins fit the table.
_FINENESS = 16
# How far the float64 of a(x) is off, at most. With u = 2^-53 and x^2 / (2 s^2) <= (12 + 2)^2 / 2 <
# 100: its four roundings make 401 u, that of the logarithm (below 64) 32 u, that of the sum 64 u;
# exp turns these 2^-43.9 into as much or less, as a(x) <= 1, and may itself be off by 2^-45, or 256
# units in the last place (libraries stay below 4; the tests look). Subtracting the uniform number
# adds u: below 2^-43.
_FLOAT_ERROR = 2.0**-40
_EXTRA_BITS = 128
_TABLES, _DECISION = Context(prec=60), Context(prec=80)
# Work on pieces that stay in the processor's cache.
_PIECE = 1 << 14


class DiscreteGaussian:
    """Integers with P(x) proportional to exp(-x^2 / (2 deviation^2)).

    Guarantee: With uniform ``randomness``, each sample is within 2^-100 of this distribution in
        total variation, and independent of all others. The proof is at the head of this module.

    Args:
        deviation: s, from 0.5 to 2^40; close to the standard deviation, but for the narrowest.
        randomness: the source of uniform bytes: 16 for each candidate, and 16 more for about one
            candidate in 2^38 (in 2^26 at the widest).

    Attributes:
        starts: the first integer of every bin.
        weights: the weight W_j of every bin.
        scale: C.

    Raises:
        ValueError: If ``deviation`` is not between 0.5 and 2^40.
    """

    def __init__(self, deviation: float, randomness: Randomness) -> None:
        if not 0.5 <= deviation <= 2.0**40:
            raise ValueError(
                "the deviation of a discrete Gaussian must be between 0.5 and 2^40, got "
                f"{deviation}"
            )
        self._deviation, self._randomness = float(deviation), randomness
        self._bits = max(0, math.floor(math.log2(deviation / _FINENESS)))
        # Uniform bits for the acceptance; float64 holds 53.
        self._fine_bits = min(53, 64 - self._bits)
        width = 1 << self._bits
        reach = math.ceil(_REACH * deviation / width)
        self.starts = [number * width for number in range(-reach, reach)]
        self.weights, self.scale = _staircase(self.starts, width, self._deviation)
        own, other = _alias(self.weights)
        with localcontext(_TABLES):
            logs = [float((Decimal(self.scale) / weight).ln()) for weight in self.weights]
        self._thresholds = np.array(own, dtype=np.uint64)
        # Columns beyond the last bin have no part of their own.
        columns = [min(column, len(self.weights) - 1) for column in range(_COLUMNS)] + other
        self._bins = np.array(columns, dtype=np.int64)
        self._offsets = np.array(self.starts, dtype=np.int64)[self._bins]
        self._logs = np.array(logs)[self._bins]
        self._steepness = 0.5 / deviation / deviation
        self._tolerance = _FLOAT_ERROR + 2.0**-self._fine_bits

    def draw(self, count: int) -> NDArray[np.int64]:
        """``count`` independent samples; shape (count,)."""
        samples = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            # A few more than are missing, since about one in forty is rejected. Surplus samples are
            # thrown away, whatever they are.
            wanted = min(_PIECE, count - done + (count - done) // 16 + 16)
            accepted = self._candidates(wanted)[: count - done]
            samples[done : done + len(accepted)] = accepted
            done += len(accepted)
        return samples

    def _candidates(self, count: int) -> NDArray[np.int64]:
        """Those of ``count`` candidates that are accepted; shape (accepted,)."""
        words = np.frombuffer(self._randomness.bytes(16 * count), dtype=np.uint64)
        choice, within = words[:count], words[count:]
        column = (choice >> np.uint64(_COLUMN_BITS)).view(np.int64)
        rest = choice & np.uint64((1 << _COLUMN_BITS) - 1)
        entry = column + _COLUMNS * (rest >= self._thresholds[column])
        x = self._offsets[entry] + (within & np.uint64((1 << self._bits) - 1)).view(np.int64)
        uniform = (within >> np.uint64(64 - self._fine_bits)).astype(np.float64)
        uniform *= 2.0**-self._fine_bits
        chance = self._chances(x, entry)
        chance -= uniform
        # U is at most 2^-f above its first f bits.
        accepted = chance > self._tolerance
        undecided = np.flatnonzero(np.abs(chance) <= self._tolerance)
        for i in undecided.tolist():
            accepted[i] = self._accepts(
                int(x[i]), int(self._bins[entry[i]]), int(within[i]) >> (64 - self._fine_bits)
            )
        return x[accepted]

    def _chances(self, x: NDArray[np.int64], entry: NDArray[np.int64]) -> NDArray[np.float64]:
        """a(x) within 2^-40 for integers ``x`` of shape (count,), each in the bin of its ``entry``
        of the table; shape (count,).
        """
        chance = x.astype(np.float64)
        chance *= chance
        chance *= -self._steepness
        chance += self._logs[entry]
        return np.exp(chance, out=chance)

    def _accepts(self, x: int, bin_of_x: int, first_bits: int) -> bool:
        """Whether a uniform number that begins with ``first_bits`` is below a(x), decided by 128
        more bits and 80 digits.
        """
        more = int.from_bytes(self._randomness.bytes(_EXTRA_BITS // 8), "little")
        uniform = (first_bits << _EXTRA_BITS) + more
        with localcontext(_DECISION):
            chance = _height(x, self._deviation) * self.scale / self.weights[bin_of_x]
            return Decimal(uniform) < chance * (1 << (self._fine_bits + _EXTRA_BITS))


def _height(x: int, deviation: float) -> Decimal:
    """exp(-x^2 / (2 deviation^2)) to the digits of the context, for exactly this float."""
    return (-(Decimal(x) ** 2) / (2 * Decimal(deviation) ** 2)).exp()


def _staircase(starts: list[int], width: int, deviation: float) -> tuple[list[int], int]:
    """Integer weights of the bins, which add up to the size of the table, and C. With both, a(x)
    is at most 1 everywhere.
    """
    size = _COLUMNS << _COLUMN_BITS
    with localcontext(_TABLES):
        heights = [
            _height(start if start >= 0 else start + width - 1, deviation) for start in starts
        ]
        total = sum(heights)
        weights = [int(height / total * size) + 1 for height in heights]
        weights[weights.index(max(weights))] -= sum(weights) - size
        return weights, int(
            min(weight / height for weight, height in zip(weights, heights, strict=True))
        ) - 1


def _alias(weights: list[int]) -> tuple[list[int], list[int]]:
    """Walker's tables in exact arithmetic: for each column the part that belongs to its own bin,
    and the bin to which the rest belongs.
    """
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
