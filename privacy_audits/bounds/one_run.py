"""Lower bounds on epsilon from a single run with many canaries, each of which took part with
probability 1/2, and from guesses which of them did.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from privacy_audits.bounds import gaussian

_LARGEST_EPSILON = 100.0


@dataclass(frozen=True)
class Guesses:
    """What an attacker said of the canaries of a run.

    Attributes:
        canaries: m, how many canaries there were.
        made: r, of how many the attacker said whether they took part.
        correct: v, how often that was right.
    """

    canaries: int
    made: int
    correct: int

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.made <= self.canaries:
            raise ValueError(f"impossible guesses: {self}")


def guess(scores: NDArray[np.float64], took_part: NDArray[np.bool_], made: int) -> Guesses:
    """Say "took part" of the ``made / 2`` canaries with the highest scores and "did not" of the
    ``made / 2`` with the lowest; abstain from the others.

    Args:
        scores: one for each canary, higher where it seems to have taken part; shape (canaries,).
        took_part: the truth; same shape.
        made: how many guesses to make, rounded down to an even number.
    """
    half = made // 2
    # Ties are broken without a look at the truth: by position, which says nothing of it.
    order = np.argsort(scores, kind="stable")
    low, high = order[:half], order[len(order) - half :]
    correct = int(took_part[high].sum() + (~took_part[low]).sum())
    return Guesses(len(scores), 2 * half, correct)


def p_value(guesses: Guesses, epsilon: float, delta: float) -> float:
    """An upper bound on the probability of at least as many correct guesses, if the run is
    (epsilon, delta)-DP (Steinke, Nasr, Jagielski 2023, arXiv:2305.08846, Theorem 5.2).

    With W binomial of r trials of probability ``e^epsilon / (1 + e^epsilon)`` it is ``P[W >= v] +
    2 m delta max_i (P[W >= v - i] - P[W >= v]) / i``.
    """
    r, v = guesses.made, guesses.correct
    probability = 1.0 / (1.0 + math.exp(-epsilon))
    beta = float(stats.binom.sf(v - 1, r, probability))
    if delta == 0.0 or v == 0:
        return beta
    i = np.arange(1, v + 1)
    gained = (stats.binom.sf(v - i - 1, r, probability) - beta) / i
    return min(1.0, beta + 2.0 * guesses.canaries * delta * float(gained.max()))


def epsilon(guesses: Guesses, delta: float, alpha: float) -> float:
    """The lower bound on epsilon of :func:`p_value`.

    Guarantee: If canaries take part independently with probability 1/2 and ``made`` is fixed before
        the scores are seen, the bound is above the true epsilon with probability at most ``alpha``.

    With m canaries and delta 0 it cannot exceed ``-log(alpha^(-1/m) - 1)``, which is 5.81 for 1000
    at 95 %: no claim above that can be refuted.
    """
    if p_value(guesses, 0.0, delta) > alpha:
        return 0.0
    return float(
        optimize.brentq(
            lambda e: p_value(guesses, e, delta) - alpha, 0.0, _LARGEST_EPSILON, xtol=1e-9
        )
    )


def refutes_gaussian(guesses: Guesses, mu: float, alpha: float) -> bool:
    """Whether so many correct guesses refute, at level ``alpha``, that the run is mu-GDP
    (Mahloujifar, Melis, Chaudhuri 2024, arXiv:2410.22235, Algorithm 3 with the trade-off curve of a
    Gaussian).
    """
    if guesses.made == 0 or guesses.correct == 0:
        return False
    m, g, v = guesses.canaries, guesses.made, guesses.correct
    right, wrong = alpha * v / m, alpha * (g - v) / m
    for i in range(v - 1, -1, -1):
        # The trade-off curve's inverse, at the probability of what was right.
        blown_up = float(stats.norm.cdf(stats.norm.ppf(right) - mu)) if right < 1.0 else 1.0
        step = max(wrong, blown_up) - wrong
        if step > 0.0 and g > i:
            right = min(1.0, right + i / (g - i) * step)
        wrong += step
        if step == 0.0 and i < v - 1:
            break
    return right + wrong > g / m


def gaussian_epsilon(guesses: Guesses, delta: float, alpha: float) -> float:
    """A lower bound on epsilon for a run whose trade-off curve is that of a Gaussian mechanism; see
    :func:`refutes_gaussian`. Tighter than :func:`epsilon`, which holds for every mechanism.
    """
    low, high = 0.0, 20.0
    if not refutes_gaussian(guesses, 1e-6, alpha):
        return 0.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if refutes_gaussian(guesses, middle, alpha) else (low, middle)
    return gaussian.epsilon_of(low, delta)
