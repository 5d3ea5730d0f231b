"""Was this person among the records? Membership inference as a measure of risk (Carlini et al.
2022, arXiv:2112.03570: the likelihood-ratio attack).

The attacker has the final model and, for every record, what models say of it that were trained with
it and without it. A figure for a report, not a test of the code: the attack is far too weak to
notice forgotten noise. So it is shown beside the same training without protection.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

from privacy_audits.bounds import one_run, roc
from privacy_audits.levels import LEVEL
from privacy_audits.result import AuditResult, Claim, Statistic
from privacy_audits.targets import training
from privfl.accounting import PoissonGaussian, adversaries

RECORDS, SHADOWS, HIDDEN, CLASSES = 1000, 16, 128, 10
# A part of the labels is wrong, so that a model must remember them.
WRONG_LABELS = 0.1
RATE, STEPS, EPSILON, DELTA = 0.1, 1000, 2.0, 1e-5
# Learning rates: at a larger one training without protection diverges.
_PLAIN, _PRIVATE = 1.0, 0.5

Scores = NDArray[np.float64]


def _logits(images: torch.Tensor, labels: torch.Tensor, sigma: float | None) -> Scores:
    """Train on the records that have a label (0 or more); what the model says of all records.

    Args:
        images: shape (records, 64).
        labels: -1 for a record that does not take part; shape (records,).
        sigma: the noise multiplier; None for training without protection.

    Returns:
        The logits; shape (records, CLASSES).
    """
    inside = labels >= 0
    model = nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    local = training.local(
        model,
        nn.functional.cross_entropy,
        TensorDataset(images[inside], labels[inside]),
        sampling_rate=RATE,
        noise_multiplier=training.NO_NOISE if sigma is None else sigma,
        max_grad_norm=training.NO_CLIPPING if sigma is None else 1.0,
        steps=STEPS,
        lr=_PLAIN if sigma is None else _PRIVATE,
    )
    start = local.flat()
    local.load(start + training.updates(local, 1)[0].astype(np.float32))
    with torch.no_grad():
        logits = model(images)
    made: Scores = logits.double().numpy()
    return made


def _scores(sigma: float | None) -> tuple[Scores, NDArray[np.bool_]]:
    """The score of every record of the attacked model, and whether it was trained on."""
    from sklearn.datasets import load_digits

    rng = np.random.default_rng()
    pixels, digits = load_digits(return_X_y=True)
    rows = rng.permutation(len(digits))[:RECORDS]
    images = torch.from_numpy(pixels[rows]).float() / 16
    labels = digits[rows].copy()
    wrong = rng.random(RECORDS) < WRONG_LABELS
    labels[wrong] = rng.integers(0, CLASSES, int(wrong.sum()))
    inside = rng.random((SHADOWS + 1, RECORDS)) < 0.5
    sure = np.empty((SHADOWS + 1, RECORDS))
    for model, members in enumerate(inside):
        # Records that do not take part have no label.
        logits = _logits(images, torch.from_numpy(np.where(members, labels, -1)), sigma)
        own = logits[np.arange(RECORDS), labels]
        logits[np.arange(RECORDS), labels] = -np.inf
        # log p / (1 - p) of the right label.
        sure[model] = (
            own - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) - (logits.max(1))
        )
    shadows, members = sure[1:], inside[1:]
    means = [
        np.where(group, shadows, 0.0).sum(0) / np.maximum(group.sum(0), 1)
        for group in (members, ~members)
    ]
    spread = np.mean(
        [
            np.where(group, np.square(shadows - mean), 0.0).sum() / group.sum()
            for group, mean in zip((members, ~members), means, strict=True)
        ]
    )
    ratio = (np.square(sure[0] - means[1]) - np.square(sure[0] - means[0])) / (2.0 * spread)
    return ratio, inside[0]


def results() -> Iterator[AuditResult]:
    """The attack on private training, and the control without protection."""
    rng = np.random.default_rng()
    sigma = training.noise_for(EPSILON, DELTA, RATE, STEPS)
    event = PoissonGaussian(sampling_rate=RATE, noise_multiplier=sigma, steps=STEPS)
    control: tuple[float, float] = (0.0, 1.0)
    adversary = adversaries("site", 2)[0]
    for what, noise in (("without protection", None), ("private", sigma)):
        began = time.perf_counter()
        scores, members = _scores(noise)
        area = roc.auroc(scores[members], scores[~members])
        low, high = roc.bootstrap(roc.auroc, scores[members], scores[~members], rng)
        caught = roc.tpr_at_fpr(scores[members], scores[~members], 0.01)
        if noise is None:
            control = (low, high)
            claim = Claim(
                statement="Control: without protection the attack tells members from others.",
                adversary=adversary,
            )
            statistic = Statistic.exact(
                f"area under the curve ({low:.3f} to {high:.3f}; {100 * caught:.1f} % found at 1 % "
                "false alarms)",
                area,
                "above 0.5",
                # A control that fails refutes nothing: without power, the attack says nothing.
                holds=True,
            )
            bound = None
        else:
            claim = Claim(
                statement="The finished model tells of one record no more than epsilon at delta.",
                adversary=adversary,
                mechanism=(event,),
                delta=DELTA,
            )
            guesses = one_run.guess(scores, members, RECORDS // 4)
            statistic = Statistic(
                name=f"area under the curve ({low:.3f} to {high:.3f}; {100 * caught:.1f} % found "
                "at 1 % false alarms)",
                value=area,
                expected=f"near 0.5; {control[0]:.3f} to {control[1]:.3f} without protection",
                p_value=one_run.p_value(guesses, EPSILON, DELTA),
            )
            bound = one_run.epsilon(guesses, DELTA, LEVEL)
        yield AuditResult(
            name=f"membership/{what}",
            claim=claim,
            attack=f"compares what the model says of each of {RECORDS} records with what "
            f"{SHADOWS} other models say that were trained with it or without it",
            statistic=statistic,
            lower_bound=bound,
            confidence=1.0 - LEVEL,
            power=1.0 if control[0] > 0.55 else 0.0,
            power_against="training without protection",
            seconds=time.perf_counter() - began,
        )
