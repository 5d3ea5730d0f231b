"""Noise for the held-out metrics of private records; the agent adds it, so that no user code can leave it out."""

from __future__ import annotations

import math

from privfl.config import Experiment
from privfl.federation.metrics import Measured
from privfl.noise.randomness import Randomness, SeededRandomness, SystemRandomness, gaussian

# A cover for rounding: of the sums to the grid of metrics, and of each record's part to length 1.
_MARGIN = 2.0**-10


def randomness_of(experiment: Experiment, site: str) -> Randomness:
    """Where an agent's noise comes from: the operating system, but for tests with a seed."""
    seed = experiment.insecure_test_seed
    return SystemRandomness() if seed is None else SeededRandomness(seed, f"{site} agent")


def noised(measured: Measured, noise_multiplier: float, randomness: Randomness) -> Measured:
    """Sums and counts of all metrics with Gaussian noise.

    The trainer has cut every record's part of the sums, and of the counts, of each metric to length 1. So one record changes all of them together
    by at most sqrt(2 * metrics), which is the unit of ``noise_multiplier``.
    """
    deviation = noise_multiplier * math.sqrt(2 * len(measured)) * (1.0 + _MARGIN)
    found = {}
    for name, (sums, counts) in measured.items():
        noise = gaussian(len(sums) + len(counts), deviation, randomness).tolist()
        values = [value + extra for value, extra in zip([*sums, *counts], noise, strict=True)]
        found[name] = (values[: len(sums)], values[len(sums) :])
    return found
