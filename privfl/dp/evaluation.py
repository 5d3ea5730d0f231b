"""Metrics of one site on its evaluation records: exact for public records; for private ones as
sums to which each record adds a bounded part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from privfl.errors import PrivflError

Metric = Callable[[torch.Tensor, torch.Tensor], tuple[Any, Any]]
Sums = dict[str, tuple[list[float], list[float]]]

# On so many groups of so many records each it is tried whether a metric adds up. Two that say
# something are enough.
_GROUPS, _TRIED = 16, 8


def measure(metrics: Mapping[str, Metric], output: torch.Tensor, target: torch.Tensor) -> Sums:
    """(sums, counts) of every metric over all evaluation records of a site.

    Args:
        metrics: by name, functions of outputs and targets that return (sums, counts).
        output: the model's outputs, shape (records, ...).
        target: the targets, shape (records, ...).

    Returns:
        By metric a list of sums and a list of counts, both as long as the metric has ratios.

    Raises:
        PrivflError: If a metric returns anything but two finite numbers, or two vectors of one
            length, with no count below 0.
    """
    measured = {}
    for name, metric in metrics.items():
        pair = _pair(name, metric(output, target))
        if not np.isfinite(pair).all() or min(pair[1]) < 0:
            raise PrivflError(
                f"evaluation.metrics.{name} must return finite (sums, counts) of one length with "
                "counts not below 0"
            )
        measured[name] = (pair[0], pair[1])
    return measured


def measure_each(metrics: Mapping[str, Metric], output: torch.Tensor, target: torch.Tensor) -> Sums:
    """As :func:`measure`, record by record: each record's sums, and its counts, are cut to
    Euclidean length 1 before they are added.

    Guarantee: One record changes the sums of one metric by at most 1, and its counts by at most 1,
        in Euclidean length and whatever the metric returns. What is not finite, or has another
        number of ratios than most, counts as zero: a single record must not be able to stop a run.

    Raises:
        PrivflError: If a metric returns no pair of one length, if its value for several records is
            not the sum over them (as AUC, which is about pairs of records), or if it is not finite
            for most of the records alone.
    """
    measured = {}
    for name, metric in metrics.items():
        _check_adds_up(name, metric, output, target)
        rows = [
            _pair(name, metric(output[i : i + 1], target[i : i + 1])) for i in range(len(output))
        ]
        if sum(bool(np.isfinite(row).all()) for row in rows) < len(rows) / 2:
            raise PrivflError(
                f"evaluation.metrics.{name} is NaN or infinite for most records alone; metrics of "
                "private evaluation records are taken record by record, so return the sum over "
                "records of a number that each has by itself, as accuracy does, or remove it"
            )
        ratios = Counter(len(sums) for sums, _ in rows).most_common(1)[0][0]
        alike = [row if len(row[0]) == ratios else ([0.0] * ratios, [0.0] * ratios) for row in rows]
        sums, counts = (
            _cut(np.array([row[part] for row in alike])).sum(axis=0).tolist() for part in (0, 1)
        )
        measured[name] = (sums, counts)
    return measured


def _pair(name: str, returned: Any) -> tuple[list[float], list[float]]:
    """What a metric returned, as a list of sums and a list of counts."""
    try:
        sums, counts = (
            torch.as_tensor(x, dtype=torch.float64).reshape(-1).tolist() for x in returned
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise PrivflError(
            f"evaluation.metrics.{name} must return a pair (sums, counts), as in (number correct, "
            f"number); it returned {type(returned).__name__}"
        ) from error
    if len(sums) != len(counts) or not sums:
        raise PrivflError(
            f"evaluation.metrics.{name} must return finite (sums, counts) of one length with "
            "counts not below 0"
        )
    return sums, counts


def _cut(rows: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Each of the rows, shape (records, ratios), cut to length 1; one that is not finite is 0."""
    rows = np.where(np.isfinite(rows).all(axis=1, keepdims=True), rows, 0.0)
    return np.asarray(rows / np.maximum(1.0, np.linalg.norm(rows, axis=1, keepdims=True)))


def _check_adds_up(name: str, metric: Metric, output: torch.Tensor, target: torch.Tensor) -> None:
    """Refuse a metric that does not add up in two groups of records. In one group alone a single
    record may be at fault; a group for which the metric is not finite says nothing.
    """
    # Records from all over the data set, which may be sorted by class.
    apart = max(2, len(output) // _TRIED)
    verdicts: list[bool] = []
    for start in range(min(apart, _GROUPS) if len(output) >= 4 else 0):
        rows = slice(start, None, apart)
        verdict = _adds_up(name, metric, output[rows], target[rows])
        verdicts += [] if verdict is None else [verdict]
        if len(verdicts) == 2:
            break
    if verdicts and not any(verdicts):
        raise PrivflError(
            f"evaluation.metrics.{name} of several records is not the sum over them, so one "
            "record's part cannot be bounded; metrics of private evaluation records must add up "
            f"record by record, as accuracy does{_shapes(output, target)}"
        )


def _shapes(output: torch.Tensor, target: torch.Tensor) -> str:
    """What to do about outputs and targets that are compared in different shapes."""
    if output.shape[1:] != (1,) or target.ndim != 1:
        return ""
    return (
        "; outputs have the shape (records, 1) and targets (records,), and comparing them compares "
        "every record with every other: use output.squeeze(1)"
    )


def _adds_up(name: str, metric: Metric, output: torch.Tensor, target: torch.Tensor) -> bool | None:
    """Whether the metric of these records is the sum over them; None where it is not finite."""
    together = np.array(_pair(name, metric(output, target)))
    if not np.isfinite(together).all():
        return None
    each = [
        np.array(_pair(name, metric(output[i : i + 1], target[i : i + 1])))
        for i in range(len(output))
    ]
    if any(part.shape != together.shape for part in each):
        return False
    return bool(np.allclose(np.sum(each, axis=0), together, rtol=1e-4, atol=1e-6))
