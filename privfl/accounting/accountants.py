"""Accountants over a list of events: Renyi (RDP) and privacy loss distributions (PLD), both by
dp-accounting.

Each gives (lower, estimate, upper) and guarantees only the upper bound, as prv_accountant does.
Gaussian DP by the central limit theorem is left out on purpose: it lies below the true epsilon in
ordinary cases.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from privfl.accounting.events import Event
from privfl.accounting.renyi import ORDERS, divergences, epsilons

Accountant = Literal["rdp", "pld"]

# The unit is one record; zero-out adjacency equals add/remove numerically and lets the number of
# records be public.
ADJACENCY = "zero-out of one record (numerically add/remove)"

# Fine enough for reports: an epsilon comes out at most 0.02 above what an interval of 1e-4 gives in
# the worst of usual cases, and eight times as fast.
_INTERVAL = 1e-3
# Beyond this a privacy loss distribution is large and slow, and its epsilon says as little as the
# Renyi bound.
_LARGEST_FOR_PLD = 100.0
# With more steps than this a privacy loss distribution takes minutes.
_MOST_STEPS_FOR_PLD = 10_000_000
# With more records of a person than this, their probabilities leave the range of floating point.
_MOST_RECORDS = 1000


class Bounds(NamedTuple):
    """An epsilon, from below and above.

    ``lower`` is a lower bound, 0 where an accountant has none; ``estimate`` is what is probably
    nearest to the true epsilon.

    Guarantee: The true epsilon is at most ``upper``. The other two are for information.
    """

    lower: float
    estimate: float
    upper: float


def _steps_by_mechanism(events: Iterable[Event]) -> dict[Event, int]:
    """Steps of each distinct mechanism; mechanisms without a step are left out."""
    steps: dict[Event, int] = {}
    for event in events:
        if event.steps:
            steps[event.once()] = steps.get(event.once(), 0) + event.steps
    return steps


class RdpAccountant:
    """Adds up the Renyi divergences of events; cheap enough to be asked after every round.

    Guarantee: The upper bound holds for a history whose parameters were fixed in advance. Where
        they depend on earlier results, :class:`RenyiFilter` is needed.

    Example:
        >>> from privfl.accounting import PoissonGaussian, RdpAccountant
        >>> accountant = RdpAccountant()
        >>> for noise_multiplier in (1.1, 0.9):
        ...     step = PoissonGaussian(sampling_rate=0.01, noise_multiplier=noise_multiplier)
        ...     accountant = accountant.compose(step.times(500))
        >>> round(accountant.epsilon(1e-5).upper, 3)
        2.391
    """

    def __init__(self) -> None:
        self._divergence = np.zeros(len(ORDERS))

    def compose(self, event: Event) -> RdpAccountant:
        """Add one event and return this accountant; the order of events does not matter."""
        if event.steps:
            self._divergence = self._divergence + event.steps * divergences(event)
        return self

    def epsilon(self, delta: float) -> Bounds:
        """The least epsilon over all orders at ``delta``: 0 for an empty history, infinite
        without noise.

        Raises:
            ValueError: If ``delta`` is not strictly between 0 and 1.
        """
        upper = float(epsilons(ORDERS, self._divergence, delta).min())
        return Bounds(0.0, upper, upper)


def epsilon_of(
    events: Iterable[Event],
    delta: float,
    accountant: Accountant = "rdp",
    interval: float = _INTERVAL,
) -> Bounds:
    """Bounds on the epsilon of a whole history at ``delta``.

    Guarantee: The upper bound holds for a history whose parameters were fixed in advance.

    Args:
        events: everything that was run, in any order.
        delta: strictly between 0 and 1.
        accountant: "rdp" (Renyi divergences), or "pld" (privacy loss distributions), which is
            tighter and slower. Where "pld" would be too large or slow, or with discrete noise,
            whose loss distribution it does not know, the upper bound is that of "rdp".
        interval: of the discretisation of privacy losses (PLD only); smaller is tighter and slower.

    Raises:
        ValueError: If ``delta`` is not strictly between 0 and 1.

    Example:
        >>> from privfl.accounting import PoissonGaussian, epsilon_of
        >>> training = PoissonGaussian(sampling_rate=0.01, noise_multiplier=1.1, steps=1000)
        >>> round(epsilon_of([training], 1e-5).upper, 3)
        1.712
        >>> round(epsilon_of([training], 1e-5, "pld").upper, 3)
        1.516
    """
    steps = _steps_by_mechanism(events)
    renyi = RdpAccountant()
    for event, count in steps.items():
        renyi.compose(event.times(count))
    bound = renyi.epsilon(delta)
    small = 0.0 < bound.upper <= _LARGEST_FOR_PLD and sum(steps.values()) <= _MOST_STEPS_FOR_PLD
    if accountant == "rdp" or not small:
        return bound
    lower, upper = (
        max(0.0, _by_pld(steps, delta, interval, pessimistic)) for pessimistic in (False, True)
    )
    if any(event.whole_orders for event in steps):
        # The losses of discrete noise are not those of continuous noise: the result is an estimate
        # and no bound.
        return Bounds(0.0, upper, bound.upper)
    # Rounding losses down is much coarser here than rounding them up, so the better estimate is the
    # upper bound.
    return Bounds(lower, upper, min(upper, bound.upper))


def _by_pld(steps: dict[Event, int], delta: float, interval: float, pessimistic: bool) -> float:
    """Epsilon by privacy loss distributions: from above if ``pessimistic``, else from below."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    parts = []
    for event, count in steps.items():
        # Unsampled steps add up to a single one with less noise, without any rounding.
        unsampled = event.rate == 1.0
        one = pld.from_gaussian_mechanism(
            standard_deviation=event.sigma / math.sqrt(count) if unsampled else event.sigma,
            pessimistic_estimate=pessimistic,
            use_connect_dots=pessimistic,
            value_discretization_interval=interval,
            sampling_prob=event.rate,
        )
        parts.append(one if unsampled else one.self_compose(count))
    try:
        return _composed(parts, delta)
    except OverflowError:  # some losses are beyond what floating point holds
        return math.inf if pessimistic else 0.0


def _composed(distributions: Iterable[Any], delta: float) -> float:
    """Epsilon of the composition of all these loss distributions."""
    return float(
        functools.reduce(
            lambda one, other: one.compose(other), distributions
        ).get_epsilon_for_delta(delta)
    )


def person_epsilon(events: Sequence[Event], delta: float, records: int) -> float:
    """An upper bound on the epsilon of a person with several records at one site.

    The person's records enter a step independently; with j of them in, the sum moves by at most j
    clipping norms. So one step is a mixture of Gaussians with binomial weights, whose loss
    distribution dp-accounting composes. A person whose records lie at several sites is bounded by
    the case that all of them lie at the site with the largest rate and the least noise.

    Guarantee: The bound holds for a history whose parameters were fixed in advance. It is infinite
        for discrete noise, for which no such bound is known, and where it was not computed.

    Args:
        events: everything that was run, in any order.
        delta: strictly between 0 and 1.
        records: how many records the person has at most, 1 or more.

    Raises:
        ValueError: If ``delta`` is not strictly between 0 and 1, or if ``records`` is below 1.

    Example:
        >>> from privfl.accounting import PoissonGaussian, person_epsilon
        >>> training = PoissonGaussian(sampling_rate=0.5, noise_multiplier=10.0, steps=10)
        >>> [round(person_epsilon([training], 1e-5, records), 3) for records in (1, 2)]
        [0.579, 1.238]
    """
    if records < 1:
        raise ValueError(f"a person has at least one record, got {records}")
    bound = epsilon_of(events, delta, "pld").upper
    steps = _steps_by_mechanism(events)
    if records == 1 or not steps:
        return bound
    # More records never cost less, so beyond the reach of loss distributions the answer is not
    # known, or not of interest.
    out_of_reach = (
        records > _MOST_RECORDS
        or bound > _LARGEST_FOR_PLD / records
        or sum(steps.values()) > _MOST_STEPS_FOR_PLD
    )
    if out_of_reach or any(event.whole_orders for event in steps):
        return math.inf
    from dp_accounting.pld import privacy_loss_distribution as pld

    parts = []
    for event, count in steps.items():
        weights = [
            math.comb(records, j) * event.rate**j * (1.0 - event.rate) ** (records - j)
            for j in range(records + 1)
        ]
        moves = [float(j) for j in range(records + 1) if weights[j] > 0.0]
        one = pld.from_mixture_gaussian_mechanism(
            standard_deviation=event.sigma,
            sensitivities=moves,
            sampling_probs=[weight for weight in weights if weight > 0.0],
            value_discretization_interval=_INTERVAL,
        )
        parts.append(one.self_compose(count))
    return max(0.0, _composed(parts, delta))
