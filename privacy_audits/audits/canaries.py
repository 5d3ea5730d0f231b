"""Which records took part? One run, a thousand canaries (Steinke, Nasr, Jagielski 2023).

Each canary of :mod:`privacy_audits.targets.orthogonal` took part with probability 1/2, in a
direction of its own and longer than the clipping norm: no record can show more. The attacker scores
every canary by how far what they see has moved along its direction, and guesses.

Black box but for what each adversary is said to see: the public has the first and the last model,
and k colluding sites with the coordinator have every sum, less their own contributions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from privacy_audits.audits import guesses
from privacy_audits.bounds import gaussian
from privacy_audits.levels import LEVEL
from privacy_audits.result import AuditResult, Claim, Statistic
from privacy_audits.targets import orthogonal
from privacy_audits.targets.job import (
    COLLUSION,
    DELTA,
    LEARNING_RATE,
    LOCAL_STEPS,
    ROUNDS,
    SAMPLING_RATE,
    RecordedRun,
)
from privfl.accounting import Adversary

_N = len(orthogonal.SITES)


@dataclass(frozen=True)
class View:
    """What one adversary has of every canary that is not their own.

    Attributes:
        adversary: who looks.
        scores: how far the sum of all steps moved along each canary, in clipping norms; shape
            (canaries,).
        took_part: the truth; same shape.
        deviation: of the noise in a score, as it is charged.
    """

    adversary: Adversary
    scores: NDArray[np.float64]
    took_part: NDArray[np.bool_]
    deviation: float


def views(run: RecordedRun) -> Iterator[View]:
    """What each adversary of the run sees, weakest first."""
    steps = ROUNDS[run.mode] * LOCAL_STEPS[run.mode]
    sigma = run.events[0].noise
    # With noise of its own at every site, each adds all of it, and the sum has that of all honest.
    share = sigma / math.sqrt(_N - COLLUSION) if run.mode == "fedsgd" else sigma
    for adversary in run.adversaries:
        honest = range(adversary.colluders, _N)
        shares = len(honest)
        moved = _moved(run, adversary.colluders)
        coordinates = [orthogonal.places(orthogonal.SITES[site]).canaries for site in honest]
        yield View(
            adversary,
            moved[np.concatenate(coordinates)],
            np.concatenate([run.truth[site] for site in honest]),
            share * math.sqrt(shares * steps),
        )


def _moved(run: RecordedRun, colluders: int) -> NDArray[np.float64]:
    """The sum over all steps of what is left of the sums, in clipping norms."""
    sites = run.sites
    expected = SAMPLING_RATE * orthogonal.RECORDS
    # In both modes the model moves by the mean over the expected batches of all sites.
    scale = expected * _N / LEARNING_RATE
    if colluders == 0:
        replicas: NDArray[np.float64] = sites[-1].arrays["replica"].astype(np.float64)
        moved: NDArray[np.float64] = (replicas[0] - replicas[-1]) * scale
        return moved
    left: NDArray[np.float64] = sites[-1].arrays["summed"].astype(np.float64)
    for site in sites[:colluders]:
        left = left - site.arrays["contributed"]
    total: NDArray[np.float64] = left.sum(axis=0)
    if run.mode == "fedsgd":
        return total * float(sites[0].facts["step"])
    return -total * scale


def results(run: RecordedRun) -> Iterator[AuditResult]:
    """For every adversary: two lower bounds on epsilon, and how well canaries separate."""
    steps = ROUNDS[run.mode] * LOCAL_STEPS[run.mode]
    for view in views(run):
        claim = Claim(
            statement="Whoever sees this learns of one record no more than epsilon at delta.",
            adversary=view.adversary,
            mechanism=run.events,
            delta=DELTA,
        )
        name = f"canaries/{run.mode}/{view.adversary.colluders} colluders"
        yield from guesses.results(
            name,
            claim,
            f"guesses which of {len(view.scores)} canaries took part, by how far the sums moved "
            "along them",
            view.scores,
            # Without noise every guess is right.
            view.took_part.astype(np.float64),
            view.took_part,
            LEVEL,
        )
        yield _separation(name, claim, view, steps)


def _separation(name: str, claim: Claim, view: View, steps: int) -> AuditResult:
    """How many deviations lie between canaries that took part and those that did not: a halved
    noise doubles it, which no bound on epsilon from one run would notice.
    """
    began = time.perf_counter()
    inside, outside = view.scores[view.took_part], view.scores[~view.took_part]
    drawn = steps * SAMPLING_RATE * (1.0 - SAMPLING_RATE)
    expected = steps * SAMPLING_RATE / math.sqrt(view.deviation**2 + drawn / 2)
    pooled = math.sqrt((inside.var(ddof=1) + outside.var(ddof=1)) / 2)
    found = float((inside.mean() - outside.mean()) / pooled)
    error = math.sqrt(1 / len(inside) + 1 / len(outside) + expected**2 / (2 * len(view.scores)))
    z = (found - expected) / error
    return AuditResult(
        name=f"{name}/separation",
        claim=claim,
        attack="measures how many deviations of the noise lie between the scores of canaries that "
        "took part and those that did not",
        statistic=Statistic(
            name="separation, in deviations",
            value=found,
            expected=f"{expected:.2f} +- {error:.2f}",
            p_value=2.0 * float(stats.norm.sf(abs(z))),
        ),
        confidence=1.0 - LEVEL,
        power=gaussian.power_of_shift(expected / error, LEVEL),
        power_against="half the noise",
        seconds=time.perf_counter() - began,
    )
