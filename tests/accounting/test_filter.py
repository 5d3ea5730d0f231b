"""The filter: as generous as a plan fixed in advance allows, and never passed, whoever chooses
the charges.
"""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from privfl.accounting import (
    ORDERS,
    DiscreteGaussian,
    Event,
    Gaussian,
    NonPrivate,
    RenyiFilter,
    epsilon_of,
)
from tests.accounting.histories import noises, rates, segments, steps_of

# (q, sigma, epsilon, steps that Renyi accounting at a fixed order admits at 1e-5).
LITERATURE = [
    (0.01, 1.0, 3.0, 2195),
    (0.02, 1.2, 4.0, 1664),
    (0.05, 2.0, 4.0, 989),
    (1.0, 20.0, 4.0, 298),
]


@pytest.fixture(scope="module")
def limit() -> RenyiFilter:
    return RenyiFilter.planned(3.0, 1e-5, steps_of(0.01, 1.0))


# -- how much fits ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("q", "sigma", "epsilon", "steps"), LITERATURE)
def test_what_was_planned_costs_little_more_than_a_fixed_plan(
    q: float, sigma: float, epsilon: float, steps: int
):
    step = steps_of(q, sigma)
    assert (
        epsilon_of([step.times(steps)], 1e-5).upper
        <= epsilon
        < epsilon_of([step.times(steps + 1)], 1e-5).upper
    )
    limit = RenyiFilter.planned(epsilon, 1e-5, step)
    admitted = limit.times(limit.nothing(), limit.cost(step))
    assert 0.94 * steps <= admitted <= steps
    spent, count = limit.nothing(), 0
    while limit.admits(spent + limit.cost(step)):
        spent, count = spent + limit.cost(step), count + 1
    assert count == admitted


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(rates, noises, st.floats(0.1, 8.0), st.floats(1e-9, 0.01))
def test_a_filter_is_never_more_generous_than_a_fixed_plan(
    q: float, sigma: float, epsilon: float, delta: float
):
    step = steps_of(q, sigma)
    limit = RenyiFilter.planned(epsilon, delta, step)
    admitted = limit.times(limit.nothing(), limit.cost(step), 10**6)
    assert epsilon_of([step.times(admitted)], delta).upper <= epsilon * (1 + 1e-12)


def test_what_was_not_planned_fits_as_well(limit: RenyiFilter):
    for other in (steps_of(0.01, 2.0), steps_of(0.05, 4.0), Gaussian(noise_multiplier=30.0)):
        fixed = 1
        while epsilon_of([other.times(fixed * 2)], 1e-5).upper <= 3.0:
            fixed *= 2
        assert limit.times(limit.nothing(), limit.cost(other)) > fixed / 2


def test_a_plan_of_discrete_noise_takes_a_whole_order():
    step = DiscreteGaussian(sampling_rate=0.02, noise_multiplier=2.0, sensitivity=1.01)
    limit = RenyiFilter.planned(2.0, 1e-5, step)
    assert limit.planned_order == int(limit.planned_order)
    assert limit.times(limit.nothing(), limit.cost(step)) > 500


@settings(max_examples=25, deadline=None)
@given(rates, noises, st.integers(1, 500), st.floats(1e-9, 0.1))
def test_a_filter_for_a_single_plan_charges_what_the_accountant_says(
    q: float, sigma: float, steps: int, delta: float
):
    plan = steps_of(q, sigma, steps)
    limit = RenyiFilter.single(5.0, delta, plan)
    assert sum(weight > 0.0 for weight in limit.weights) == 1
    assert limit.epsilon_of(limit.cost(plan)) == pytest.approx(
        epsilon_of([plan], delta).upper, rel=1e-12
    )


# -- the rule --------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.1, 20.0), st.floats(1e-9, 0.1))
def test_the_running_epsilon_is_within_the_budget_exactly_while_the_filter_admits(
    seed: int, epsilon: float, delta: float
):
    limit = RenyiFilter.planned(epsilon, delta, steps_of(0.02, 1.0))
    rng = np.random.default_rng(seed)
    # Around the bounds, so that both answers come up; where there is none, anything.
    totals = (
        np.maximum(limit.bounds, 1e-3)
        * rng.uniform(0.9, 8.0, size=(40, 1))
        * rng.uniform(0.3, 1.5, size=(40, len(ORDERS)))
    )
    totals[:, ~np.isfinite(limit.bounds)] = rng.uniform(
        1e-6, 10.0, size=(40, int((~np.isfinite(limit.bounds)).sum()))
    )
    for total in totals:
        assert limit.admits(total) == (limit.epsilon_of(total) <= epsilon)
    assert limit.epsilons_of(totals).tolist() == [limit.epsilon_of(total) for total in totals]


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(segments)
def test_the_running_epsilon_of_real_charges(rows: list[tuple[float, float, int]]):
    limit = RenyiFilter.planned(3.0, 1e-5, steps_of(0.01, 1.0))
    spent = limit.nothing()
    assert limit.epsilon_of(spent) == 0.0
    before = 0.0
    for row in rows:
        spent = spent + limit.cost(steps_of(*row))
        epsilon = limit.epsilon_of(spent)
        assert limit.admits(spent) == (epsilon <= 3.0)
        assert epsilon >= before
        before = epsilon
    # Nobody may be told less than the accountant would say of the same history.
    assert before >= epsilon_of([steps_of(*row) for row in rows], 1e-5).upper * (1 - 1e-12)


def test_admission_means_one_order_within_its_bound(limit: RenyiFilter):
    takes_part = np.isfinite(limit.bounds)
    assert 2 <= takes_part.sum() < 20
    for i in range(len(ORDERS)):
        total = np.full(len(ORDERS), math.inf)
        total[i] = max(limit.bounds[i], 0.0)
        assert limit.admits(total) == bool(takes_part[i])
        total[i] = np.nextafter(total[i], math.inf)
        assert not limit.admits(total)


def test_what_protects_nothing_is_never_admitted(limit: RenyiFilter):
    for event in (NonPrivate(what="x"), steps_of(0.1, 0.0), Gaussian(noise_multiplier=0.0)):
        assert not limit.admits(limit.cost(event))
        assert not limit.admits_plan(limit.cost(event))
        assert limit.times(limit.nothing(), limit.cost(event)) == 0
        assert limit.epsilon_of(limit.cost(event)) == math.inf
        assert limit.admits(limit.cost(event.times(0)))


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(segments, rates, noises)
def test_times_is_the_largest_number_that_is_admitted_as_a_plan(
    rows: list[tuple[float, float, int]], q: float, sigma: float
):
    limit = RenyiFilter.planned(3.0, 1e-5, steps_of(0.01, 1.0))
    spent = sum((limit.cost(steps_of(*row)) for row in rows), limit.nothing())
    step = limit.cost(steps_of(q, sigma))
    most = limit.times(spent, step)
    if most:
        assert limit.admits_plan(spent + most * step)
    assert not limit.admits_plan(spent + (most + 1) * step)
    assert limit.times(spent, step, 3) == min(most, 3)


@pytest.mark.slow
def test_a_plan_that_is_admitted_can_be_charged_in_any_order(limit: RenyiFilter):
    """Adding up in another order may round differently; what was promised must still fit."""
    rng = random.Random(1)
    for _ in range(8):
        parts = [
            limit.cost(steps_of(rng.uniform(0.001, 0.1), rng.uniform(0.8, 5.0))) for _ in range(5)
        ]
        spent, charges = limit.nothing(), []
        while True:
            part = rng.choice(parts)
            room = limit.times(spent, part, 400)
            if not room:
                break
            charges += [part] * room
            spent = spent + room * part
        assert limit.admits_plan(spent)
        rng.shuffle(charges)
        total = limit.nothing()
        for part in charges:
            total = total + part
            assert limit.admits(total)


# -- stored and refused ----------------------------------------------------------------------------


def test_a_filter_survives_storage(limit: RenyiFilter):
    stored = json.loads(json.dumps(limit.to_dict()))
    assert RenyiFilter.from_dict(stored) == limit
    assert (RenyiFilter.from_dict(stored).bounds == limit.bounds).all()


def test_a_stored_filter_that_was_altered_is_refused(limit: RenyiFilter):
    stored = limit.to_dict()
    doubled = [2 * weight for weight in stored["weights"]]
    for change in (
        {"extra": 1},
        {"planned_order": 3.5},
        {"epsilon": "3.0"},
        {"epsilon": -3.0},
        {"epsilon": math.inf},
        {"epsilon": math.nan},
        {"epsilon": None},
        {"delta": 0.0},
        {"delta": 1.0},
        {"weights": doubled},
        {"weights": stored["weights"][:-1]},
        {"weights": [-0.1, *stored["weights"][1:]]},
        {"weights": None},
        {"orders": [*stored["orders"][1:], 1.0]},
        {"orders": stored["orders"][1:]},
        {"orders": []},
    ):
        with pytest.raises(ValueError, match=r"."):
            RenyiFilter.from_dict(stored | change)
    for name in stored:
        with pytest.raises(ValueError, match=r"."):
            RenyiFilter.from_dict({key: value for key, value in stored.items() if key != name})


@pytest.mark.parametrize(
    "weights", [(0.6, 0.6), (1.1, -0.1), (0.0, 0.0), (math.nan, 0.5), (1.0,), (0.5, 0.5, 0.0)]
)
def test_weights_that_are_no_shares_are_refused(weights: tuple[float, ...]):
    with pytest.raises(ValueError, match="weight"):
        RenyiFilter(1.0, 1e-5, (2.0, 3.0), weights)


@pytest.mark.parametrize(
    "budget",
    [(0.0, 1e-5), (-1.0, 1e-5), (math.inf, 1e-5), (math.nan, 1e-5), (1.0, 0.0), (1.0, 1.0)],
)
def test_a_budget_that_is_none_is_refused(budget: tuple[float, float]):
    with pytest.raises(ValueError, match="a budget needs"):
        RenyiFilter(*budget, (2.0, 3.0), (0.5, 0.5))


@pytest.mark.parametrize("epsilon", [0.01, 0.5, 3.0, 20.0])
@pytest.mark.parametrize(
    "plan", [steps_of(0.01, 1.0), steps_of(1.0, 20.0), steps_of(0.001, 0.5), steps_of(0.5, 100.0)]
)
def test_the_shares_of_a_planned_filter_are_at_most_all(epsilon: float, plan: Event):
    limit = RenyiFilter.planned(epsilon, 1e-5, plan)
    assert 0.95 < math.fsum(limit.weights) <= 1.0
    assert max(limit.weights) > 0.5
    assert limit.weights[ORDERS.index(limit.planned_order)] == max(limit.weights)


# -- against an adversary --------------------------------------------------------------------------

# Large enough that a few thousand runs can tell a delta that is passed from one that is not.
EPSILON, DELTA = 3.0, 0.05
POOL: list[Event] = [
    *(
        steps_of(q, sigma, steps)
        for q in (1.0, 0.6, 0.3)
        for sigma in (1.5, 2.5, 4.0, 8.0)
        for steps in (1, 3)
    ),
    *(Gaussian(noise_multiplier=sigma) for sigma in (2.0, 3.0, 5.0, 6.0, 10.0, 15.0)),
]
# A strategy ends when it was refused so often in a row.
PATIENCE = 6


def played(
    limit: RenyiFilter, strategies: int, *, present: bool, seed: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Let random strategies charge while ``limit`` admits, each choosing by what it has learnt
    about whether a record is there.

    A strategy takes from one handful of mechanisms while its evidence is above a threshold, and
    from another while it is below; all three are drawn. What it takes is simulated with the record
    present, or absent.

    Returns:
        The privacy loss of each transcript, towards the world that was simulated; and the totals,
        added up apart from the filter.
    """
    rng = np.random.default_rng(seed)
    costs = np.array([limit.cost(event) for event in POOL])
    q, sigma, steps = (
        np.array([getattr(event, name) for event in POOL]) for name in ("rate", "sigma", "steps")
    )
    spent, evidence = np.zeros((strategies, len(limit.orders))), np.zeros(strategies)
    taken = np.zeros((strategies, len(POOL)))
    refused = np.zeros(strategies, dtype=int)
    threshold = rng.normal(0.0, 0.7, strategies)
    handfuls = rng.integers(len(POOL), size=(2, strategies, 4))
    while (live := np.flatnonzero(refused < PATIENCE)).size:
        above = (evidence[live] > threshold[live]).astype(int)
        pick = handfuls[above, live, rng.integers(4, size=live.size)]
        pick = np.where(refused[live] > 0, rng.integers(len(POOL), size=live.size), pick)
        admitted = np.array([limit.admits(total) for total in spent[live] + costs[pick]])
        refused[live] = np.where(admitted, 0, refused[live] + 1)
        runs, pick = live[admitted], pick[admitted]
        spent[runs] += costs[pick]
        taken[runs, pick] += 1
        for step in range(int(steps[pick].max(initial=0))):
            # In the sum, the record's clipped contribution is 1 where it was sampled.
            inside = rng.random(runs.size) < q[pick] if present else np.zeros(runs.size)
            seen = inside + sigma[pick] * rng.standard_normal(runs.size)
            ratio = np.log(1 - q[pick] + q[pick] * np.exp((2 * seen - 1) / (2 * sigma[pick] ** 2)))
            evidence[runs] += np.where(step < steps[pick], ratio, 0.0)
    known = np.isfinite(costs)
    totals = np.where(taken @ ~known > 0, math.inf, taken @ np.where(known, costs, 0.0))
    return evidence if present else -evidence, totals


def passes_delta(loss: NDArray[np.float64]) -> bool:
    """Whether these losses show, beyond chance (four standard errors), that (EPSILON, DELTA)
    does not hold.
    """
    beyond = np.maximum(0.0, 1.0 - np.exp(EPSILON - loss))
    return float(beyond.mean()) > DELTA + 4.0 * float(beyond.std()) / math.sqrt(len(loss))


class Doubled(RenyiFilter):
    """A filter that is wrong: each order may see twice of what it may."""

    @property
    def bounds(self) -> NDArray[np.float64]:
        return 2.0 * super().bounds


def never_passed(strategies: int) -> None:
    limit = RenyiFilter.planned(EPSILON, DELTA, steps_of(1.0, 4.0))
    for present in (True, False):
        loss, totals = played(limit, strategies, present=present)
        assert (totals <= limit.bounds * (1 + 1e-12)).any(axis=1).all()
        # They did use it up, mostly.
        assert np.median(limit.epsilons_of(totals)) > 0.9 * EPSILON
        assert not passes_delta(loss)


@pytest.mark.slow
def test_no_strategy_passes_the_filter():
    never_passed(2000)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_no_strategy_of_many_passes_the_filter():
    never_passed(100_000)


@pytest.mark.slow
@pytest.mark.parametrize("present", [True, False])
def test_a_wrong_filter_is_caught_by_the_same_strategies(present: bool):
    limit = RenyiFilter.planned(EPSILON, DELTA, steps_of(1.0, 4.0))
    loss, totals = played(
        Doubled.planned(EPSILON, DELTA, steps_of(1.0, 4.0)), 2000, present=present
    )
    assert passes_delta(loss)
    assert not (totals <= limit.bounds).any(axis=1).all()
