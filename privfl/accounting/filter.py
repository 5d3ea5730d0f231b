"""The weighted Renyi filter: a budget for charges each of which may be chosen after a look at all
results so far.

A stopping rule of the kind "compose with the best accountant and stop at the target" is not valid
in general once later parameters depend on earlier results ("f-DP Filters", Honkela et al. 2026).
Renyi divergences of one *fixed* order may be added up and stopped at a bound (Feldman and Zrnic
2021). This filter keeps several orders alive, each with its share of delta; docs/accounting.md has
the proof.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfl.accounting.events import Event
from privfl.accounting.renyi import ORDERS, divergence_bounds, divergences, epsilons

# Shares of delta, by the multiple of the planned order. Most goes to the order that the whole
# budget is planned with; some to its multiples, because a run that spends a part of the budget is
# accounted for best at a higher order, and other mechanisms at other orders. That costs 3 to 4 % of
# the steps that the planned order alone would admit. All shares add up to a little less than 1, so
# that rounding never makes them more.
_SHARES = {0.25: 0.01, 0.5: 0.03, 1.0: 0.72, 2.0: 0.12, 4.0: 0.06, 8.0: 0.02}
# Shares of fixed orders. Without them a run that spends a hundredth of the budget could not be told
# from one that spends a tenth.
_FIXED_SHARES = {64.0: 0.01, 256.0: 0.01, 1024.0: 0.01}
# A plan is admitted if it fits with this to spare, so that adding it up in another order cannot
# make its last step fail.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class RenyiFilter:
    """A budget of (epsilon, delta), divided over Renyi orders once and for all.

    Totals of what was spent are vectors of Renyi divergences, one for each order.

    Guarantee: As long as :meth:`admits` holds for the total of all charges, everything released is
        (epsilon, delta)-differentially private, also if every charge was chosen after a look at the
        results of all earlier ones (docs/accounting.md has the proof).

    Attributes:
        epsilon: the epsilon of the whole budget, positive and finite.
        delta: the delta of the whole budget, strictly between 0 and 1.
        orders: Renyi orders, rising, all above 1.
        weights: each order's share of delta, adding up to at most 1; an order with weight 0 takes
            no part.

    Raises:
        ValueError: If a field is out of these ranges.

    Example:
        >>> from privfl.accounting import PoissonGaussian, RenyiFilter
        >>> run = PoissonGaussian(sampling_rate=0.5, noise_multiplier=12.0, steps=100)
        >>> budget = RenyiFilter.planned(4.0, 1e-5, run)
        >>> spent = budget.nothing() + budget.cost(run)
        >>> round(budget.epsilon_of(spent), 3)
        1.989
        >>> budget.times(spent, budget.cost(run))
        3
        >>> budget.admits(spent + 4 * budget.cost(run))
        False
    """

    epsilon: float
    delta: float
    orders: tuple[float, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not (0.0 < self.epsilon < math.inf and 0.0 < self.delta < 1.0):
            raise ValueError(
                f"a budget needs a positive epsilon and a delta in (0, 1), got ({self.epsilon}, "
                f"{self.delta})"
            )
        if (
            len(self.orders) != len(self.weights)
            or min(self.orders, default=0.0) <= 1.0
            or min(self.weights) < 0.0
        ):
            raise ValueError("a filter needs orders above 1 and a weight, not negative, for each")
        if not 0.0 < math.fsum(self.weights) <= 1.0:
            raise ValueError(
                "the weights of a filter must add up to at most 1, they add up to "
                f"{math.fsum(self.weights)}"
            )

    @classmethod
    def planned(cls, epsilon: float, delta: float, plan: Event) -> RenyiFilter:
        """A filter that gives most of delta to the order at which the budget admits most steps
        like those of ``plan``.
        """
        step = divergences(plan)
        whole = np.array([order == int(order) for order in ORDERS])
        with np.errstate(divide="ignore", invalid="ignore"):
            reach = divergence_bounds(ORDERS, epsilon, delta, [_SHARES[1.0]] * len(ORDERS)) / step
        best = int(np.nanargmax(reach))
        # Whole orders serve discrete noise as well, and always converge: worth a percent of the
        # steps.
        best_whole = int(np.nanargmax(np.where(whole, reach, -math.inf)))
        chosen = best_whole if reach[best_whole] >= 0.99 * reach[best] else best
        weights = [0.0] * len(ORDERS)
        shares = [(ORDERS[chosen] * multiple, share) for multiple, share in _SHARES.items()] + [
            *_FIXED_SHARES.items()
        ]
        for order, share in shares:
            distance = np.abs(np.log(np.array(ORDERS) / order))
            weights[int(distance.argmin())] += share
        return cls(epsilon, delta, ORDERS, tuple(weights))

    @classmethod
    def single(cls, epsilon: float, delta: float, plan: Event) -> RenyiFilter:
        """A filter for exactly ``plan``, fixed in advance: all of delta goes to the order that is
        best for it, where it costs what the Renyi accountant says.
        """
        best = int(epsilons(ORDERS, plan.steps * divergences(plan), delta).argmin())
        return cls(epsilon, delta, ORDERS, tuple(float(i == best) for i in range(len(ORDERS))))

    @property
    def planned_order(self) -> float:
        """The order with the largest share."""
        return self.orders[int(np.argmax(self.weights))]

    @property
    def bounds(self) -> NDArray[np.float64]:
        """The divergence that each order admits in total; shape (orders,), -inf for orders that
        take no part.
        """
        return divergence_bounds(self.orders, self.epsilon, self.delta, self.weights)

    def nothing(self) -> NDArray[np.float64]:
        """The total before the first charge; shape (orders,)."""
        return np.zeros(len(self.orders))

    def cost(self, event: Event) -> NDArray[np.float64]:
        """What all steps of ``event`` together add to a total; shape (orders,)."""
        return event.steps * divergences(event, self.orders) if event.steps else self.nothing()

    def admits(self, spent: NDArray[np.float64]) -> bool:
        """Whether some order still bounds a total of ``spent``, shape (orders,): the rule for a
        single charge.
        """
        return bool((spent <= self.bounds).any())

    def admits_plan(self, spent: NDArray[np.float64]) -> bool:
        """The same for a total that is to be reached in many charges, whose sum may be rounded
        differently; a little stricter than :meth:`admits`.
        """
        return bool((spent * (1.0 + _ROUNDING) <= self.bounds).any())

    def epsilon_of(self, spent: NDArray[np.float64], delta: float | None = None) -> float:
        """Epsilon of a total of ``spent``, shape (orders,): that of the smallest budget, divided
        as this one is, that admits it; at ``delta``, or else at the delta of the budget.
        """
        return float(self.epsilons_of(spent, delta))

    def epsilons_of(
        self, spent: NDArray[np.float64], delta: float | None = None
    ) -> NDArray[np.float64]:
        """The same for many totals at once, shape (..., orders); returns shape (...)."""
        by_order = epsilons(
            self.orders, spent, self.delta if delta is None else delta, self.weights
        )
        least: NDArray[np.float64] = by_order.min(axis=-1)
        return least

    def times(
        self, spent: NDArray[np.float64], step: NDArray[np.float64], most: int = 1 << 40
    ) -> int:
        """How often a cost of ``step`` still fits on top of a total of ``spent``, both of shape
        (orders,); ``most`` at most.
        """
        left = self.bounds / (1.0 + _ROUNDING) - spent
        with np.errstate(divide="ignore", invalid="ignore"):
            times = np.where(left >= 0.0, np.where(step > 0.0, left / step, most), 0.0)
        return int(min(times.max(), most))

    def to_dict(self) -> dict[str, Any]:
        """The filter as JSON-ready values; floats survive JSON to the last bit."""
        return {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "orders": list(self.orders),
            "weights": list(self.weights),
            "planned_order": self.planned_order,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> RenyiFilter:
        """The filter that :meth:`to_dict` wrote.

        Raises:
            ValueError: If ``fields`` are not exactly what :meth:`to_dict` writes.
        """
        try:
            limit = cls(
                float(fields["epsilon"]),
                float(fields["delta"]),
                tuple(map(float, fields["orders"])),
                tuple(map(float, fields["weights"])),
            )
        except (KeyError, TypeError) as error:
            raise ValueError("not a filter") from error
        if limit.to_dict() != dict(fields):
            raise ValueError("not a filter of this version")
        return limit
