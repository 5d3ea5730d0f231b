"""Short names for histories, shared by the tests of the accountants and of the filter."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from hypothesis import strategies as st

from privfl.accounting import ORDERS, PoissonGaussian

rates = st.floats(0.001, 1.0)
noises = st.floats(0.5, 20.0)
counts = st.integers(1, 2000)
deltas = st.floats(1e-10, 0.5)
segments = st.lists(st.tuples(rates, noises, counts), min_size=1, max_size=4)
# Where divergences are exact, and those of discrete noise known.
WHOLE = np.array([order == int(order) for order in ORDERS])


def steps_of(q: float, sigma: float, steps: int = 1) -> PoissonGaussian:
    """Steps of DP-SGD."""
    return PoissonGaussian(sampling_rate=float(q), noise_multiplier=float(sigma), steps=steps)


def history(rows: Iterable[tuple[float, float, int]]) -> list[PoissonGaussian]:
    """Several segments, each (q, sigma, steps)."""
    return [steps_of(*row) for row in rows]


def printed(text: str) -> float:
    """Half a unit of the last digit of a published number, and a little: what it may be away
    from the truth.
    """
    return 0.51 * 10.0 ** -len(text.partition(".")[2])
