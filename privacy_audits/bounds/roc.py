"""How well scores tell two groups apart."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Scores = NDArray[np.float64]


def auroc(positives: Scores, negatives: Scores) -> float:
    """The probability that a positive scores higher than a negative; ties count half (Mann and
    Whitney 1947).
    """
    ranks = stats.rankdata(np.concatenate([positives, negatives]))
    n = len(positives)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * len(negatives)))


def tpr_at_fpr(positives: Scores, negatives: Scores, fpr: float) -> float:
    """The share of positives above the threshold that at most ``fpr`` of the negatives exceed."""
    allowed = int(np.floor(fpr * len(negatives)))
    threshold = np.sort(negatives)[len(negatives) - 1 - allowed]
    return float((positives > threshold).mean())


def bootstrap(
    statistic: Callable[[Scores, Scores], float],
    positives: Scores,
    negatives: Scores,
    rng: np.random.Generator,
    repetitions: int = 500,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """A percentile interval of ``statistic``, both groups resampled (Efron 1979).

    Args:
        statistic: of positives and negatives.
        positives: shape (positives,).
        negatives: shape (negatives,).
        rng: the source of the resamples.
        repetitions: how many resamples.
        confidence: of the interval.
    """
    values = [
        statistic(rng.choice(positives, len(positives)), rng.choice(negatives, len(negatives)))
        for _ in range(repetitions)
    ]
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(values, [tail, 1.0 - tail])
    return float(low), float(high)
