"""Epsilon from how often a distinguisher errs, over independent runs."""

from __future__ import annotations

import math

from scipy import stats


def upper(successes: int, trials: int, alpha: float) -> float:
    """An upper bound on the probability of a success (Clopper and Pearson 1934).

    Guarantee: The bound is below the true probability with probability at most ``alpha``.

    Args:
        successes: how often it happened, of ``trials``.
        trials: independent trials, 1 or more.
        alpha: the probability with which the bound may fail.
    """
    if successes >= trials:
        return 1.0
    return float(stats.beta.ppf(1.0 - alpha, successes + 1, trials - successes))


def lower(successes: int, trials: int, alpha: float) -> float:
    """A lower bound on the probability of a success; see :func:`upper`."""
    return 1.0 - upper(trials - successes, trials, alpha)


def epsilon_from_rates(
    false_positives: int,
    negatives: int,
    false_negatives: int,
    positives: int,
    delta: float,
    alpha: float,
) -> float:
    """A lower bound on epsilon from a distinguisher that was fixed beforehand.

    Every (epsilon, delta) mechanism keeps ``TPR <= e^epsilon FPR + delta`` and ``TNR <= e^epsilon
    FNR + delta`` (Kairouz, Oh, Viswanath 2015, Theorem 2.1); the rates are replaced by their
    Clopper-Pearson bounds, as Jagielski, Ullman, Oprea (2020) and Nasr et al. (arXiv:2101.04535)
    do.

    Guarantee: The bound is above the true epsilon with probability at most ``alpha``.

    Args:
        false_positives: how often the distinguisher took a run without the record for one with it.
        negatives: independent runs without the record.
        false_negatives: how often it took a run with the record for one without it.
        positives: independent runs with the record.
        delta: that of the claim.
        alpha: the probability with which the bound may fail, divided between the two rates.
    """
    fpr = upper(false_positives, negatives, alpha / 2)
    fnr = upper(false_negatives, positives, alpha / 2)
    ratios = [(1.0 - delta - fnr) / fpr, (1.0 - delta - fpr) / fnr]
    return max(0.0, *(math.log(ratio) for ratio in ratios if ratio > 0.0))
