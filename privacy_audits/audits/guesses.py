"""From an attacker's scores of canaries to two results: lower bounds on epsilon from one run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privacy_audits.bounds import gaussian, one_run
from privacy_audits.bounds.one_run import Guesses
from privacy_audits.bounds.thresholds import Bonferroni
from privacy_audits.result import AuditResult, Claim, Statistic

Scores = NDArray[np.float64]
Truth = NDArray[np.bool_]
# All canaries, half of them, and a quarter are guessed.
_THRESHOLDS = 3


@dataclass(frozen=True)
class _Shown:
    """What scores show of epsilon."""

    bound: float
    gaussian_bound: float
    surest: Guesses
    p_value: float
    refutes_gaussian: bool


def results(
    name: str,
    claim: Claim,
    attack: str,
    scores: Scores,
    control: Scores,
    took_part: Truth,
    level: float,
    seconds: float = 0.0,
) -> Iterator[AuditResult]:
    """Two lower bounds on epsilon: one for every mechanism, one for a Gaussian.

    Args:
        name: of what is audited.
        claim: with an epsilon.
        attack: how the scores were made.
        scores: one for each canary, higher where it seems to have taken part; shape (canaries,).
        control: the scores of the same attack if the noise was forgotten; same shape.
        took_part: the truth; same shape.
        level: the probability with which each result may refute a true claim.
        seconds: what the scores have taken.
    """
    began = time.perf_counter() - seconds
    epsilon, delta = claim.epsilon, claim.delta
    assert epsilon is not None
    assert delta is not None
    shown, able = (_shown(s, took_part, epsilon, delta, level) for s in (scores, control))
    surest = shown.surest
    share = surest.correct / max(1, surest.made)
    what = f"share right of the {surest.made} surest guesses"
    every = AuditResult(
        name=f"{name}/one-run bound",
        claim=claim,
        attack=f"{attack} (arXiv:2305.08846)",
        statistic=Statistic(
            name=what,
            value=share,
            expected=f"at most {1.0 / (1.0 + math.exp(-epsilon)):.2f} on average",
            p_value=shown.p_value,
        ),
        lower_bound=shown.bound,
        confidence=1.0 - level,
        power=1.0 if able.bound > epsilon else 0.0,
        power_against="noise forgotten",
        seconds=time.perf_counter() - began,
    )
    yield every
    yield every.model_copy(
        update={
            "name": f"{name}/one-run bound, Gaussian",
            "attack": f"{attack}, held against the trade-off curve of a Gaussian mechanism "
            "(arXiv:2410.22235)",
            "statistic": Statistic.exact(
                what, share, "not more than the curve allows", holds=not shown.refutes_gaussian
            ),
            "lower_bound": shown.gaussian_bound,
            "power": 1.0 if able.refutes_gaussian else 0.0,
            "seconds": 0.0,
        }
    )


def _shown(scores: Scores, took_part: Truth, epsilon: float, delta: float, level: float) -> _Shown:
    thresholds = Bonferroni.halves(len(scores), _THRESHOLDS)
    share = level / len(thresholds.made)
    every = [one_run.guess(scores, took_part, made) for made in thresholds.made]
    mu = gaussian.mu_of(epsilon, delta)
    return _Shown(
        bound=thresholds.bound(
            scores, took_part, lambda g, alpha: one_run.epsilon(g, delta, alpha), level
        ),
        gaussian_bound=thresholds.bound(
            scores, took_part, lambda g, alpha: one_run.gaussian_epsilon(g, delta, alpha), level
        ),
        surest=every[-1],
        p_value=min(1.0, len(every) * min(one_run.p_value(g, epsilon, delta) for g in every)),
        refutes_gaussian=any(one_run.refutes_gaussian(g, mu, share) for g in every),
    )
