"""Renyi accounting over events, by dp-accounting.

The conversion to (epsilon, delta) is that of Canonne, Kamath, Steinke 2020 (Proposition 12) as dp-accounting implements it; the
Renyi divergence of the Poisson-subsampled Gaussian is that of Mironov, Talwar, Zhang 2019. Every epsilon here is an upper bound.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from privfl.accounting.events import PoissonGaussian
from privfl.errors import PrivflError

if TYPE_CHECKING:
    import numpy as np

# The unit is one record; zero-out adjacency equals add/remove numerically and lets the number of records be public.
ADJACENCY = "zero-out of one record (numerically add/remove)"


# Noise of sixteen thousand times the clipping norm drowns even a million records a step.
LARGEST_NOISE_MULTIPLIER = 2.0**14


def _library() -> Any:
    import dp_accounting.rdp as library

    # dp-accounting leaves out Renyi orders whose series does not converge, which is sound (the minimum runs over fewer
    # orders), and says so on every call; on a user's screen that reads like a fault.
    logging.getLogger("absl").setLevel(logging.ERROR)
    return library


@functools.lru_cache(maxsize=256)
def _rdp_of_one_step(sampling_rate: float, noise_multiplier: float) -> tuple[np.ndarray, np.ndarray]:
    """(orders, divergences) of a single step, each of shape (orders,). Cached: it takes about 60 ms, and steps only add."""
    import dp_accounting as dpa

    accountant = _library().RdpAccountant(neighboring_relation=dpa.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(dpa.PoissonSampledDpEvent(sampling_rate, dpa.GaussianDpEvent(noise_multiplier)))
    return accountant.orders, accountant.rdp


class RdpAccountant:
    """Adds up the Renyi divergence of events; cheap to ask after every round."""

    def __init__(self) -> None:
        self._orders: np.ndarray | None = None
        self._rdp: np.ndarray | float = 0.0
        self._unbounded = False

    def compose(self, event: PoissonGaussian) -> None:
        """Add one event; order does not matter."""
        if event.steps == 0:
            return
        if event.noise_multiplier == 0.0:
            self._unbounded = True
            return
        self._orders, step = _rdp_of_one_step(event.sampling_rate, event.noise_multiplier)
        self._rdp = self._rdp + event.steps * step

    def epsilon(self, delta: float) -> float:
        """The least epsilon over all orders at ``delta``: 0 for an empty history, infinite without noise.

        Raises:
            ValueError: ``delta`` outside (0, 1).
        """
        if not 0.0 < delta < 1.0:
            raise ValueError(f"delta must be in (0, 1), got {delta}")
        if self._unbounded:
            return math.inf
        if self._orders is None:
            return 0.0
        epsilon, _ = _library().compute_epsilon(self._orders, self._rdp, delta)
        return max(0.0, float(epsilon))


def epsilon_of(events: Iterable[PoissonGaussian], delta: float) -> float:
    """Epsilon of a whole history at ``delta`` (upper bound)."""
    accountant = RdpAccountant()
    for event in events:
        accountant.compose(event)
    return accountant.epsilon(delta)


def least_noise_multiplier(target_epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The smallest noise multiplier, rounded up to four decimals, with which ``steps`` steps cost at most ``target_epsilon``.

    Raises:
        PrivflError: not even ``LARGEST_NOISE_MULTIPLIER`` reaches the target.
    """

    def epsilon(noise_multiplier: float) -> float:
        return epsilon_of([PoissonGaussian(sampling_rate, noise_multiplier, steps)], delta)

    high = 1.0
    while epsilon(high) > target_epsilon:
        if high >= LARGEST_NOISE_MULTIPLIER:
            raise PrivflError(
                f"privacy.target_epsilon {target_epsilon:g} cannot be reached at delta {delta:g} with {steps} steps: noise of "
                f"{LARGEST_NOISE_MULTIPLIER:g} times the clipping norm, which leaves nothing to learn, still costs {epsilon(high):.3g}; "
                "raise target_epsilon, or lower rounds, local_steps or sampling_rate"
            )
        high *= 2.0
    low = high / 2.0 if high > 1.0 else 0.0
    # Bisection on the grid of four decimals, so that the value on screen is the value used.
    below, above = math.floor(low * 1e4), math.ceil(high * 1e4)
    while above - below > 1:
        middle = (below + above) // 2
        if epsilon(middle / 1e4) <= target_epsilon:
            above = middle
        else:
            below = middle
    return above / 1e4
