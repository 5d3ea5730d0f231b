"""Gaussian differential privacy: a mechanism that is as hard to tell apart as N(0, 1) and N(mu, 1)
(Dong, Roth, Su 2022), and the tests that stand on it.
"""

from __future__ import annotations

import math

from scipy import optimize, stats

from privacy_audits.bounds import clopper_pearson

_LARGEST_MU = 40.0


def delta_of(epsilon: float, mu: float) -> float:
    """The least delta at which mu-GDP is (epsilon, delta)-DP (Dong, Roth, Su, Corollary 2.13).

    Args:
        epsilon: 0 or more.
        mu: 0 or more.
    """
    if mu <= 0.0:
        return 0.0
    first = stats.norm.cdf(-epsilon / mu + mu / 2)
    # e^epsilon times a tail, in logarithms: neither overflows alone.
    second = math.exp(epsilon + float(stats.norm.logcdf(-epsilon / mu - mu / 2)))
    return max(0.0, float(first) - second)


def epsilon_of(mu: float, delta: float) -> float:
    """The least epsilon at which mu-GDP is (epsilon, delta)-DP."""
    if delta_of(0.0, mu) <= delta:
        return 0.0
    top = 1.0
    while delta_of(top, mu) > delta:
        top *= 2.0
    return float(optimize.brentq(lambda e: delta_of(e, mu) - delta, 0.0, top, xtol=1e-10))


def mu_of(epsilon: float, delta: float) -> float:
    """The largest mu that is (epsilon, delta)-DP: the inverse of :func:`epsilon_of`.

    Args:
        epsilon: 0 or more.
        delta: strictly between 0 and 1.
    """
    return float(
        optimize.brentq(lambda mu: delta_of(epsilon, mu) - delta, 1e-9, _LARGEST_MU, xtol=1e-12)
    )


def mu_from_rates(
    false_positives: int, negatives: int, false_negatives: int, positives: int, alpha: float
) -> float:
    """A lower bound on mu from a distinguisher that was fixed beforehand (Nasr et al. 2023,
    arXiv:2302.07956, section 3.2): ``mu >= Phi^-1(1 - FPR) - Phi^-1(FNR)``.

    Guarantee: If the mechanism is Gaussian, the bound is above its mu with probability at most
        ``alpha``. For another mechanism it says nothing.

    The arguments are those of
    :func:`privacy_audits.bounds.clopper_pearson.epsilon_from_rates`.
    """
    fpr = clopper_pearson.upper(false_positives, negatives, alpha / 2)
    fnr = clopper_pearson.upper(false_negatives, positives, alpha / 2)
    if fpr >= 1.0 or fnr >= 1.0:
        return 0.0
    return max(0.0, float(stats.norm.ppf(1.0 - fpr) - stats.norm.ppf(fnr)))


def two_sided(z: float) -> float:
    """The probability that a standard normal number is at least as far from 0 as ``z``."""
    return 2.0 * float(stats.norm.sf(abs(z)))


def power_of_shift(shift: float, level: float) -> float:
    """How often a two-sided test at ``level`` notices that a standard normal statistic is moved by
    ``shift``.
    """
    limit = float(stats.norm.isf(level / 2))
    return float(stats.norm.sf(limit - abs(shift)) + stats.norm.cdf(-limit - abs(shift)))
