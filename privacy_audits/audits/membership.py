"""Was this person among the records? Membership inference as a measure of risk, by two attacks: the
likelihood-ratio attack (LiRA; Carlini et al. 2022, arXiv:2112.03570) and the relative one (RMIA;
Zarifzadeh, Liu, Shokri 2024, arXiv:2312.03262).

The attacker has the final model and, for every record, what models say of it that were trained with
it and without it. A figure for a report, not a test of the code: the attacks are far too weak to
notice forgotten noise. So they are shown beside the same training without protection.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import nn
from torch.utils.data import TensorDataset

from privacy_audits.bounds import one_run, roc
from privacy_audits.bounds.membership import Confidences, confidences, lira, rmia
from privacy_audits.bounds.one_run import Guesses
from privacy_audits.levels import LEVEL
from privacy_audits.result import AuditResult, Claim, Statistic
from privacy_audits.targets import training
from privfl.accounting import PoissonGaussian, adversaries

# The other digits of the data set, nearly 800, are the population: no model is trained on them.
RECORDS, SHADOWS, HIDDEN, CLASSES = 1000, 16, 64, 10
# A part of the labels is wrong, so that a model must remember them.
WRONG_LABELS = 0.2
RATE, STEPS = 0.2, 150
# Of so many records an attacker says whether they were members; without protection nearly all of
# these guesses are right.
GUESSES = 100
# So small that such guesses refute the claim. At delta 1e-5 not even 100 right ones would.
EPSILON, DELTA = 1.0, 1e-6
# Learning rates: at one that suits training without protection, noise drowns what is learnt.
_PLAIN, _PRIVATE = 0.7, 0.1

Scores = NDArray[np.float64]


@contextmanager
def _one_thread() -> Iterator[None]:
    """These models are so small that threads of torch only wait for each other, on a busy machine
    five times as long as training takes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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


@dataclass(frozen=True)
class _Attacked:
    """What both attacks found out about one training.

    Attributes:
        members: whether a record was trained on; shape (RECORDS,).
        scores: of the records, by attack; each of shape (RECORDS,).
    """

    members: NDArray[np.bool_]
    scores: dict[str, Scores]


@_one_thread()
def _attack(sigma: float | None) -> _Attacked:
    """Train a model and its shadow models, and attack it."""
    from sklearn.datasets import load_digits

    rng = np.random.default_rng()
    pixels, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(labels))
    # Pixels of about mean 0 and deviation 1 train in a fifth of the steps.
    images = torch.from_numpy((pixels[order] - 5.0) / 6.0).float()
    labels = labels[order]
    wrong = rng.random(len(labels)) < WRONG_LABELS
    labels[wrong] = rng.integers(0, CLASSES, int(wrong.sum()))
    inside = np.zeros((SHADOWS + 1, len(labels)), dtype=bool)
    inside[:, :RECORDS] = rng.random((SHADOWS + 1, RECORDS)) < 0.5
    said = np.stack(
        [
            # Records that do not take part have no label.
            confidences(
                _logits(images, torch.from_numpy(np.where(members, labels, -1)), sigma), labels
            )
            for members in inside
        ]
    )
    records = Confidences(said[0, :RECORDS], said[1:, :RECORDS])
    population = Confidences(said[0, RECORDS:], said[1:, RECORDS:])
    return _Attacked(
        inside[0, :RECORDS],
        {"LiRA": lira(records, inside[1:, :RECORDS]), "RMIA": rmia(records, population)},
    )


def _power(control: Guesses) -> float:
    """The probability that guesses which are right as often as those of ``control`` refute."""
    refuting = [
        correct
        for correct in range(control.made + 1)
        if one_run.p_value(Guesses(control.canaries, control.made, correct), EPSILON, DELTA) < LEVEL
    ]
    # Delta alone can keep the p-value above the level, whatever the attacker guesses.
    if not refuting:
        return 0.0
    return float(stats.binom.sf(refuting[0] - 1, control.made, control.correct / control.made))


def results() -> Iterator[AuditResult]:
    """The attacks on private training, and the control without protection."""
    rng = np.random.default_rng()
    sigma = training.noise_for(EPSILON, DELTA, RATE, STEPS)
    event = PoissonGaussian(sampling_rate=RATE, noise_multiplier=sigma, steps=STEPS)
    adversary = adversaries("site", 2)[0]
    without: dict[str, tuple[str, float]] = {}
    for private in (False, True):
        began = time.perf_counter()
        attacked = _attack(sigma if private else None)
        members = attacked.members
        for attack, scores in attacked.scores.items():
            area = roc.auroc(scores[members], scores[~members])
            low, high = roc.bootstrap(roc.auroc, scores[members], scores[~members], rng)
            caught = roc.tpr_at_fpr(scores[members], scores[~members], 0.01)
            name = (
                f"area under the curve ({low:.3f} to {high:.3f}; {100 * caught:.1f} % found at 1 % "
                "false alarms)"
            )
            guesses = one_run.guess(scores, members, GUESSES)
            if private:
                between, power = without[attack]
                claim = Claim(
                    statement="The finished model tells of one record no more than epsilon at "
                    "delta.",
                    adversary=adversary,
                    mechanism=(event,),
                    delta=DELTA,
                )
                statistic = Statistic(
                    name=name,
                    value=area,
                    expected=f"near 0.5; {between} without protection",
                    p_value=one_run.p_value(guesses, EPSILON, DELTA),
                )
                bound = one_run.epsilon(guesses, DELTA, LEVEL)
            else:
                power = _power(guesses)
                without[attack] = f"{low:.3f} to {high:.3f}", power
                claim = Claim(
                    statement="Control: without protection the attack tells members from others.",
                    adversary=adversary,
                )
                # A control that fails refutes nothing: without power, the attack says nothing.
                statistic = Statistic.exact(name, area, "above 0.5", holds=True)
                bound = None
            now = time.perf_counter()
            yield AuditResult(
                name=f"membership/{attack}, {'private' if private else 'without protection'}",
                claim=claim,
                attack=f"compares what the model says of each of {RECORDS} records with what "
                f"{SHADOWS} other models say that were trained with it or without it"
                + (", and with what they say of other records" if attack == "RMIA" else ""),
                statistic=statistic,
                lower_bound=bound,
                confidence=1.0 - LEVEL,
                power=power,
                power_against="training without protection",
                seconds=now - began,
            )
            began = now
