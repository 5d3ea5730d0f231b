"""Tests of what noise and samples should look like; every function returns a p-value, two-sided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import interpolate, stats

from privacy_audits.bounds.gaussian import power_of_shift, two_sided

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """What a test gave.

    Attributes:
        value: the statistic, in the unit that the test's docstring says.
        p_value: the probability of such a value, or a stranger one, if nothing is wrong.
    """

    value: float
    p_value: float


def variance(numbers: Numbers, expected: float) -> Outcome:
    """Whether independent Gaussian numbers of mean 0 have the variance ``expected``.

    The statistic is the ratio of the measured deviation to the expected one; the sum of squares
    over ``expected`` is chi-squared.
    """
    numbers = numbers.ravel()
    chi = float(np.square(numbers).sum() / expected)
    low = float(stats.chi2.cdf(chi, numbers.size))
    return Outcome(
        math.sqrt(chi / numbers.size),
        min(1.0, 2.0 * min(low, float(stats.chi2.sf(chi, numbers.size)))),
    )


def power_of_variance(count: int, ratio: float, level: float) -> float:
    """How often :func:`variance` notices that ``count`` numbers have a deviation of ``ratio`` times
    the expected one.
    """
    low, high = stats.chi2.ppf([level / 2, 1.0 - level / 2], count)
    return float(stats.chi2.cdf(low / ratio**2, count) + stats.chi2.sf(high / ratio**2, count))


def mean(numbers: Numbers, expected: float, deviation: float) -> Outcome:
    """Whether independent numbers of known deviation have the mean ``expected``; the statistic is
    the difference in standard errors.
    """
    numbers = numbers.ravel()
    z = float((numbers.mean() - expected) / (deviation / math.sqrt(numbers.size)))
    return Outcome(z, two_sided(z))


def correlation(pairs: Sequence[tuple[Numbers, Numbers]]) -> Outcome:
    """Whether all pairs of vectors are uncorrelated; the statistic is the largest |r|.

    Under independence r sqrt(n) is close to standard normal for the thousands of numbers that
    audits have. The p-value is for all pairs together (Bonferroni).
    """
    with np.errstate(invalid="ignore"):
        coefficients = [(float(np.corrcoef(a.ravel(), b.ravel())[0, 1]), a.size) for a, b in pairs]
    # Constant numbers have no correlation: two that never change are as alike as can be.
    known = [(1.0 if math.isnan(r) else r, n) for r, n in coefficients]
    p = min(two_sided(math.atanh(min(abs(r), 1 - 1e-15)) * math.sqrt(n - 3)) for r, n in known)
    return Outcome(max(abs(r) for r, _ in known), min(1.0, len(pairs) * p))


def power_of_correlation(count: int, tests: int, r: float, level: float) -> float:
    """How often :func:`correlation` notices a correlation of ``r`` in one of ``tests`` pairs."""
    return power_of_shift(math.atanh(r) * math.sqrt(count - 3), level / tests)


def normality(numbers: Numbers, deviation: float) -> Outcome:
    """Whether numbers come from N(0, deviation^2) (Kolmogorov and Smirnov)."""
    found = stats.kstest(numbers.ravel() / deviation, "norm")
    return Outcome(float(found.statistic), float(found.pvalue))


def uniformity(fractions: Numbers) -> Outcome:
    """Whether numbers come from the uniform distribution on [0, 1] (Kolmogorov and Smirnov)."""
    found = stats.kstest(fractions.ravel(), "uniform")
    return Outcome(float(found.statistic), float(found.pvalue))


def wrapping(sums: Numbers, members: int) -> Outcome:
    """Whether sums of ``members`` numbers between -1/2 and 1/2, of which only the fractional part
    is known, are otherwise those of independent uniform numbers; the statistic is the measured
    variance of their whole part, given the fractional one, over the expected one.

    Given the fractional part f of such a sum, its whole part is j with the probability that the
    Irwin-Hall density has at f + j.
    """
    shifted = sums.ravel() + members / 2
    whole = np.floor(shifted)
    density = interpolate.BSpline.basis_element(np.arange(members + 1))
    j = np.arange(members)[:, None]
    weights = density(shifted - whole + j)
    expected = (weights * j).sum(0)
    second = (weights * (j - expected) ** 2).sum(0)
    fourth = (weights * (j - expected) ** 4).sum(0)
    squares = np.square(whole - expected)
    z = float((squares - second).sum() / math.sqrt((fourth - np.square(second)).sum()))
    return Outcome(float(squares.sum() / second.sum()), two_sided(z))


def rate(successes: int, trials: int, expected: float) -> Outcome:
    """Whether independent trials succeed at the rate ``expected``; the statistic is the rate."""
    found = stats.binomtest(successes, trials, expected)
    return Outcome(successes / trials, float(found.pvalue))


def power_of_rate(trials: int, expected: float, actual: float, level: float) -> float:
    """How often :func:`rate` notices that the rate is ``actual``, by the normal approximation."""
    shift = (actual - expected) / math.sqrt(expected * (1.0 - expected) / trials)
    return power_of_shift(shift, level)


def spread(counts: NDArray[np.int64], trials: int, probability: float) -> Outcome:
    """Whether binomial counts vary as they should; the statistic is the ratio of the measured
    variance to the expected one.

    The sum of squares over the variance is close to chi-squared where the counts are in the
    hundreds, as batch sizes are.
    """
    expected = trials * probability * (1.0 - probability)
    found = variance(counts.astype(np.float64) - trials * probability, expected)
    return Outcome(found.value**2, found.p_value)
