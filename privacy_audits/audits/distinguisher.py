"""Was this record in it? Many runs with it and many without (Nasr et al. 2023, arXiv:2302.07956).

A site trains on a few records, with and without a last one whose gradient is as long as clipping
allows. The attacker sees the update, projects it on that record's direction, and compares it with a
threshold that was fixed beforehand. All records take part in every step, so that the trade-off
curve is that of a Gaussian mechanism exactly, and the bound can come close to the claim.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from scipy import stats
from torch import nn
from torch.utils.data import TensorDataset

from privacy_audits.bounds import clopper_pearson, gaussian
from privacy_audits.levels import LEVEL
from privacy_audits.result import AuditResult, Claim, Statistic
from privacy_audits.targets import training
from privfl.accounting import Event, PoissonGaussian, adversaries

EPSILON, DELTA, STEPS = 2.0, 1e-5, 4
RECORDS, RUNS = 4, 4000


def _scores(
    with_record: bool, sigma: float, runs: int
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """How far each run's update moved along the record, in clipping norms."""
    inputs = torch.eye(RECORDS + 1)[: RECORDS + with_record]
    model = nn.Linear(RECORDS + 1, 1, bias=False)
    nn.init.zeros_(model.weight)
    local = training.local(
        model,
        lambda output, target: (output.squeeze(1) * target).mean(),
        TensorDataset(inputs, torch.full((len(inputs),), 5.0)),
        sampling_rate=1.0,
        noise_multiplier=sigma,
        max_grad_norm=1.0,
        steps=STEPS,
        lr=1.0,
    )
    scores: np.ndarray[tuple[int], np.dtype[np.float64]] = -training.updates(local, runs)[
        :, -1
    ] * len(inputs)
    return scores


def results(runs: int = RUNS) -> Iterator[AuditResult]:
    """The two bounds of ``runs`` runs with the record, and as many without."""
    began = time.perf_counter()
    sigma = training.noise_for(EPSILON, DELTA, 1.0, STEPS)
    events: tuple[Event, ...] = (
        PoissonGaussian(sampling_rate=1.0, noise_multiplier=sigma, steps=STEPS),
    )
    claim = Claim(
        statement="Whoever sees a site's update learns of one record no more than epsilon at "
        "delta.",
        adversary=adversaries("site", 2)[1],
        mechanism=events,
        delta=DELTA,
    )
    inside, outside = (_scores(there, sigma, runs) for there in (True, False))
    # Half way between where scores lie with the record and without, by the claim.
    threshold = STEPS / 2
    false_positives = int((outside > threshold).sum())
    false_negatives = int((inside <= threshold).sum())
    rates = (false_positives, runs, false_negatives, runs)
    claimed_mu = math.sqrt(STEPS) / sigma
    bounds = {
        "every mechanism": clopper_pearson.epsilon_from_rates(*rates, DELTA, LEVEL),
        "Gaussian": gaussian.epsilon_of(gaussian.mu_from_rates(*rates, LEVEL), DELTA),
    }
    wrong = (false_positives + false_negatives) / (2 * runs)
    expected = float(stats.norm.sf(claimed_mu / 2))
    low = float(stats.binom.cdf(round(wrong * 2 * runs), 2 * runs, expected))
    half = round(runs * float(stats.norm.sf(claimed_mu)))
    broken = {
        "every mechanism": clopper_pearson.epsilon_from_rates(0, runs, 0, runs, DELTA, LEVEL),
        "Gaussian": gaussian.epsilon_of(
            gaussian.mu_from_rates(half, runs, half, runs, LEVEL), DELTA
        ),
    }
    against = {"every mechanism": "noise forgotten", "Gaussian": "half the noise"}
    for kind, bound in bounds.items():
        now = time.perf_counter()
        yield AuditResult(
            name=f"distinguisher/bound, {kind}",
            claim=claim,
            attack=f"tells {runs} updates with one record from {runs} without it",
            statistic=Statistic(
                name="share of wrong answers",
                value=wrong,
                expected=f"at least {expected:.3f} on average",
                p_value=low,
            ),
            lower_bound=bound,
            confidence=1.0 - LEVEL,
            power=1.0 if broken[kind] > EPSILON else 0.0,
            power_against=against[kind],
            seconds=now - began,
        )
        began = now
