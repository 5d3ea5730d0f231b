"""Scores of membership attacks: from what models say of records to which records were members.

An attacked model is compared with shadow models, each trained on a random half of the same records.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Confidences:
    """What models say of records: log p / (1 - p), with p the probability of the right label.

    Attributes:
        attacked: of the attacked model; shape (records,).
        shadows: of the shadow models; shape (shadows, records).
    """

    attacked: Scores
    shadows: Scores


def confidences(logits: Scores, labels: NDArray[np.int64]) -> Scores:
    """Log p / (1 - p) of each record's label, exact where p rounds to 1.

    Args:
        logits: shape (records, classes).
        labels: shape (records,).
    """
    rows = np.arange(len(labels))
    others = logits.copy()
    others[rows, labels] = -np.inf
    confidence: Scores = logits[rows, labels] - np.logaddexp.reduce(others, axis=1)
    return confidence


def lira(records: Confidences, members: NDArray[np.bool_]) -> Scores:
    """The likelihood-ratio attack (Carlini et al. 2022, arXiv:2112.03570): is the attacked model's
    confidence rather that of shadow models with the record, or without it?

    The confidences are taken for normal, with means of each record's own and one variance for all,
    as the paper advises for few shadow models.

    Args:
        records: what the models say of the records.
        members: which record was in which shadow model; shape (shadows, records).

    Returns:
        Higher where a record seems to be a member; shape (records,).
    """
    groups = (members, ~members)
    with_it, without_it = (
        np.where(group, records.shadows, 0.0).sum(0) / np.maximum(group.sum(0), 1)
        for group in groups
    )
    variance = np.mean(
        [
            np.square(records.shadows - mean)[group].mean()
            for group, mean in zip(groups, (with_it, without_it), strict=True)
        ]
    )
    ratio: Scores = (
        np.square(records.attacked - without_it) - np.square(records.attacked - with_it)
    ) / (2.0 * variance)
    return ratio


def rmia(records: Confidences, population: Confidences) -> Scores:
    """The relative attack (Zarifzadeh, Liu, Shokri 2024, arXiv:2312.03262), online and with gamma
    1: how many records that are no members does a record beat in likelihood ratio?

    The ratio of a record is its probability under the attacked model to its mean over the shadow
    models, half of which have seen it.

    Args:
        records: what the models say of the records.
        population: what they say of others, which no model was trained on.

    Returns:
        The share of the population that a record beats or equals, between 0 and 1; shape
        (records,).
    """
    ours, theirs = _log_ratio(records), np.sort(_log_ratio(population))
    share: Scores = np.searchsorted(theirs, ours, side="right") / len(theirs)
    return share


def _log_ratio(said: Confidences) -> Scores:
    log_p, log_shadows = (-np.logaddexp(0.0, -c) for c in (said.attacked, said.shadows))
    ratio: Scores = log_p - np.logaddexp.reduce(log_shadows, axis=0) + np.log(len(log_shadows))
    return ratio
