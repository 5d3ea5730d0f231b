"""Metrics as one vector that adds up over sites.

A metric is a list of ratios, sums over counts; its value is their mean (one ratio for accuracy, one
per class for balanced accuracy). Each site contributes for each metric, in order of name: its sums,
its counts, its own value, and 1 if it has a value.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Measured = Mapping[str, tuple[list[float], list[float]]]


def pack(measured: Measured, layout: Mapping[str, int]) -> NDArray[np.float64]:
    """One site's contribution; zeros where it has no evaluation records.

    Shape (sum of 2 * ratios + 2,).
    """
    values: list[float] = []
    for name in sorted(layout):
        sums, counts = measured.get(name, ([0.0] * layout[name], [0.0] * layout[name]))
        own = _value(sums, counts)
        values += [*sums, *counts, 0.0 if own is None else own, 0.0 if own is None else 1.0]
    return np.array(values, dtype=np.float64)


def unpack(total: NDArray[np.float64], layout: Mapping[str, int]) -> dict[str, float]:
    """The metrics behind a sum of contributions: NAME over all records, NAME_mean_over_sites
    over the sites that have a value.
    """
    metrics: dict[str, float] = {}
    start = 0
    for name in sorted(layout):
        ratios = layout[name]
        sums, counts = (
            total[start : start + ratios].tolist(),
            total[start + ratios : start + 2 * ratios].tolist(),
        )
        own_total, sites = total[start + 2 * ratios : start + 2 * ratios + 2].tolist()
        start += 2 * ratios + 2
        value = _value(sums, counts)
        if value is not None:
            metrics[name] = value
        if sites > 0:
            metrics[f"{name}_mean_over_sites"] = own_total / sites
    return metrics


def _value(sums: list[float], counts: list[float]) -> float | None:
    ratios = [s / c for s, c in zip(sums, counts, strict=True) if c > 0]
    return sum(ratios) / len(ratios) if ratios else None
