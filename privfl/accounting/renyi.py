"""Renyi divergences of events, and what they mean in (epsilon, delta).

The divergence of the Poisson-subsampled Gaussian is that of Mironov, Talwar, Zhang 2019, as
dp-accounting computes it. The conversion is Proposition 12 of Canonne, Kamath, Steinke 2020, in
both directions, because a filter needs the inverse. Only the first call of :func:`divergences` for
a mechanism loads dp-accounting, which takes most of a second.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from privfl.accounting.events import Event

if TYPE_CHECKING:
    from collections.abc import Sequence

# dp-accounting's own choice, which covers the Gaussian mechanism in all regimes of interest.
ORDERS: tuple[float, ...] = (
    *(1 + x / 10 for x in range(1, 100)),
    *map(float, range(11, 64)),
    128.0,
    256.0,
    512.0,
    1024.0,
)

# Noise below this counts as none: its square is near the end of floating point, where differences
# become NaN.
_NO_NOISE = 1e-100


@functools.lru_cache(maxsize=4096)
def _one_step(rate: float, sigma: float, orders: tuple[float, ...]) -> NDArray[np.float64]:
    """Divergences of one step of the Gaussian mechanism on a Poisson sample; shape (orders,)."""
    import dp_accounting as dpa
    from dp_accounting import rdp

    # dp-accounting leaves out orders whose series does not converge, which is sound (the minimum
    # runs over fewer orders), and says so on every call; on a user's screen that reads like a
    # fault.
    logging.getLogger("absl").setLevel(logging.ERROR)
    accountant = rdp.RdpAccountant(
        list(orders), neighboring_relation=dpa.NeighboringRelation.ADD_OR_REMOVE_ONE
    )
    accountant.compose(dpa.PoissonSampledDpEvent(rate, dpa.GaussianDpEvent(sigma)))
    known = dict(zip(accountant.orders.tolist(), accountant.rdp.tolist(), strict=True))
    sampled = np.array([known.get(order, math.nan) for order in orders])
    # An order that is left out, or NaN, gets the bound of the mechanism without sampling, which by
    # convexity is never below the true value (fmin passes over NaN). A value below 0 is rounding.
    vector: NDArray[np.float64] = np.maximum(
        0.0, np.fmin(sampled, np.array(orders) / (2.0 * sigma**2))
    )
    vector.flags.writeable = False
    return vector


def divergences(event: Event, orders: tuple[float, ...] = ORDERS) -> NDArray[np.float64]:
    """Upper bounds on the Renyi divergences of a *single* step of ``event``.

    Steps and events add up, order by order, also if each was chosen after a look at the results of
    all before (Feldman and Zrnic 2021, for a fixed order).

    Args:
        event: the mechanism; its number of steps does not matter.
        orders: Renyi orders, all above 1.

    Returns:
        Shape (orders,); infinite where no bound is known.

    Example:
        >>> from privfl.accounting import Gaussian, divergences
        >>> divergences(Gaussian(noise_multiplier=2.0), (2.0, 4.0, 8.0)).tolist()
        [0.25, 0.5, 1.0]
    """
    if event.sigma < _NO_NOISE:
        return np.full(len(orders), math.inf)
    vector = _one_step(event.rate, event.sigma, orders)
    if event.whole_orders:
        whole = np.array([order == int(order) for order in orders])
        return np.where(whole, vector, math.inf)
    return vector


def epsilons(
    orders: Sequence[float],
    divergence: NDArray[np.float64],
    delta: float,
    weights: Sequence[float] | None = None,
) -> NDArray[np.float64]:
    """The epsilon that each order gives, at ``delta`` or at the order's own share of it
    (Canonne, Kamath, Steinke 2020, Proposition 12).

    Args:
        orders: Renyi orders, all above 1.
        divergence: the total divergence of each order; shape (..., orders).
        delta: strictly between 0 and 1.
        weights: each order's share of delta; without them each order has all of it.

    Returns:
        Shape (..., orders); never negative, infinite where an order gives no bound.

    Raises:
        ValueError: If ``delta`` is not strictly between 0 and 1.
    """
    alpha, share = _orders_and_shares(orders, delta, weights)
    # A share of zero makes the epsilon of its order infinite, as it should be.
    with np.errstate(divide="ignore", invalid="ignore"):
        epsilon = divergence + np.log1p(-1.0 / alpha) - np.log(share * alpha) / (alpha - 1.0)
    # A divergence of any order bounds that of order 1, and with it the total variation distance:
    # sqrt(1 - exp(-KL)) <= delta.
    epsilon = np.where((share > 0.0) & (divergence <= -np.log1p(-(share**2))), 0.0, epsilon)
    return np.maximum(0.0, epsilon)


def divergence_bounds(
    orders: Sequence[float], epsilon: float, delta: float, weights: Sequence[float] | None = None
) -> NDArray[np.float64]:
    """The largest divergence of each order with which :func:`epsilons` stays at or below
    ``epsilon``; shape (orders,), -inf where no divergence does.

    Raises:
        ValueError: If ``delta`` is not strictly between 0 and 1.
    """
    alpha, share = _orders_and_shares(orders, delta, weights)
    with np.errstate(divide="ignore"):
        bound = epsilon - np.log1p(-1.0 / alpha) + np.log(share * alpha) / (alpha - 1.0)
    return np.where(share > 0.0, np.maximum(bound, -np.log1p(-(share**2))), -math.inf)


def _orders_and_shares(
    orders: Sequence[float], delta: float, weights: Sequence[float] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The orders, and delta's share of each; both of shape (orders,)."""
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta must be in (0, 1), got {delta}")
    alpha = np.asarray(orders, dtype=np.float64)
    return alpha, np.full(len(alpha), delta) if weights is None else np.asarray(
        weights, dtype=np.float64
    ) * delta
