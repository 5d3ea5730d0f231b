"""Renyi divergences and their meaning in (epsilon, delta), against their integral,
dp-accounting's own conversion and published values.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from privfl.accounting import ORDERS, DiscreteGaussian, Gaussian, NonPrivate, divergences, epsilons
from privfl.accounting.renyi import divergence_bounds
from tests.accounting.histories import WHOLE, deltas, noises, rates, steps_of

# Min over orders of rdp + log(1 / delta) / (order - 1), which the publications used themselves
# (Abadi et al. 2016; the tutorials of TensorFlow Privacy; Bu et al. 2020): (q, sigma, steps,
# epsilon at 1e-5).
CLASSIC = [
    (0.01, 4.0, 10_000, 1.2586),
    (256 / 60_000, 1.3, 15 * 60_000 // 256, 1.1921),
    (256 / 60_000, 1.1, 60 * 60_000 // 256, 3.0083),
    (256 / 60_000, 0.7, 45 * 60_000 // 256, 7.1013),
    (256 / 60_000, 1.3, 20 * 60_000 // 256, 1.3497),
    (256 / 60_000, 0.7, 70 * 60_000 // 256, 8.6783),
    (240 / 60_000, 1.3, 15 * 250, 1.1597),
    (240 / 60_000, 1.1, 60 * 250, 2.9050),
    (240 / 60_000, 0.7, 45 * 250, 6.8596),
]


@pytest.mark.parametrize(("q", "sigma", "steps", "epsilon"), CLASSIC)
def test_the_divergences_give_the_published_classic_values(
    q: float, sigma: float, steps: int, epsilon: float
):
    step = divergences(steps_of(q, sigma))
    classic = min(steps * r + math.log(1e5) / (a - 1) for a, r in zip(ORDERS, step, strict=True))
    assert classic == pytest.approx(epsilon, abs=6e-5)


def integrated(q: float, sigma: float, order: float) -> float:
    """The divergence of one step by its definition: log E[(1 - q + q exp((2z - 1) / 2
    sigma^2))^order] / (order - 1), z ~ N(0, sigma^2).
    """
    z = np.linspace(-12 * sigma, order + 12 * sigma, 20_001)
    ratio = np.logaddexp(np.log1p(-q), math.log(q) + (2 * z - 1) / (2 * sigma**2))
    density = -0.5 * (z / sigma) ** 2 - math.log(sigma * math.sqrt(2 * math.pi))
    return float(np.logaddexp.reduce(density + order * ratio) + math.log(z[1] - z[0])) / (order - 1)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 0.99), st.floats(0.5, 10.0))
@example(0.75, 4.0)
@example(0.84375, 1.0)
def test_the_divergences_are_never_below_the_integral_and_exact_at_whole_orders(
    q: float, sigma: float
):
    low = np.array(ORDERS) < 20
    expected = np.array([integrated(q, sigma, order) for order in np.array(ORDERS)[low]])
    bounds = divergences(steps_of(q, sigma))[low]
    assert (bounds >= expected * (1 - 1e-9) - 1e-11).all()
    np.testing.assert_allclose(bounds[WHOLE[low]], expected[WHOLE[low]], rtol=1e-6, atol=1e-11)


@given(noises)
def test_the_gaussian_has_its_own_divergence(sigma: float):
    expected = np.array(ORDERS) / (2 * sigma**2)
    np.testing.assert_allclose(divergences(Gaussian(noise_multiplier=sigma)), expected, rtol=1e-12)
    np.testing.assert_allclose(divergences(steps_of(1.0, sigma, 9)), expected, rtol=1e-12)


def test_a_cached_divergence_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        divergences(steps_of(0.1, 1.0))[0] = 0.0


@settings(max_examples=20, deadline=None)
@given(rates, noises, st.floats(1.0, 3.0))
def test_discrete_noise_has_the_whole_orders_only(q: float, sigma: float, sensitivity: float):
    discrete = divergences(
        DiscreteGaussian(sampling_rate=q, noise_multiplier=sigma, sensitivity=sensitivity)
    )
    assert (discrete[WHOLE] == divergences(steps_of(q, sigma / sensitivity))[WHOLE]).all()
    assert np.isinf(discrete[~WHOLE]).all()
    assert WHOLE.sum() > 50


def test_no_noise_has_no_finite_order():
    assert np.isinf(divergences(steps_of(0.1, 0.0))).all()
    assert np.isinf(divergences(NonPrivate(what="all"))).all()


@pytest.mark.parametrize("q", [1e-12, 1e-3, 0.1, 1.0])
def test_hardly_any_noise_is_never_cheaper_than_some(q: float):
    """Far down dp-accounting returns NaN, of which max(0, NaN) makes a step that costs nothing."""
    least = epsilons(ORDERS, divergences(steps_of(q, 0.1)), 1e-5).min()
    for power in (-324, -300, -170, *range(-165, -140), -101, -99, -50, -10, -3):
        for event in (
            steps_of(q, 10.0**power),
            DiscreteGaussian(sampling_rate=q, noise_multiplier=10.0**power, sensitivity=1.01),
        ):
            bounds = divergences(event)
            assert not np.isnan(bounds).any()
            assert epsilons(ORDERS, bounds, 1e-5).min() >= least


# From so small that they cost nothing to more than anybody spends.
vectors = st.lists(
    st.floats(-12, 4).map(lambda power: 10.0**power), min_size=len(ORDERS), max_size=len(ORDERS)
).map(np.array)
shares = (
    st.lists(st.integers(0, 1000), min_size=len(ORDERS), max_size=len(ORDERS))
    .filter(any)
    .map(lambda n: np.array(n) / sum(n))
)


@settings(deadline=None, max_examples=60)
@given(vectors, deltas)
def test_the_conversion_is_that_of_dp_accounting(divergence: np.ndarray, delta: float):
    from dp_accounting.rdp import compute_epsilon

    expected = [
        compute_epsilon([order], [value], delta)[0]
        for order, value in zip(ORDERS, divergence, strict=True)
    ]
    computed = epsilons(ORDERS, divergence, delta)
    np.testing.assert_allclose(computed, expected, rtol=1e-9, atol=1e-12)
    assert computed.min() == pytest.approx(
        compute_epsilon(ORDERS, divergence, delta)[0], rel=1e-9, abs=1e-12
    )


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(vectors, deltas, shares)
def test_a_share_of_delta_is_a_smaller_delta(
    divergence: np.ndarray, delta: float, weights: np.ndarray
):
    computed = epsilons(ORDERS, divergence, delta, weights)
    for i in range(0, len(ORDERS), 10):
        alone = (
            epsilons(ORDERS[i : i + 1], divergence[i : i + 1], delta * weights[i])[0]
            if weights[i]
            else math.inf
        )
        assert computed[i] == pytest.approx(alone, rel=1e-12)
    assert np.isinf(computed[weights == 0.0]).all()


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(vectors, deltas, st.none() | shares)
def test_the_bounds_are_the_inverse_of_the_conversion(
    divergence: np.ndarray, delta: float, weights: np.ndarray | None
):
    for i, epsilon in enumerate(epsilons(ORDERS, divergence, delta, weights)):
        if 0.0 < epsilon < math.inf:
            back = divergence_bounds(ORDERS, float(epsilon), delta, weights)[i]
            assert back == pytest.approx(divergence[i], rel=1e-9, abs=1e-9)
    if weights is not None:
        assert (divergence_bounds(ORDERS, 1.0, delta, weights) == -math.inf).tolist() == (
            weights == 0.0
        ).tolist()


@settings(deadline=None, max_examples=60)
@given(st.floats(1e-3, 50.0), deltas, st.none() | shares)
def test_a_total_at_the_bounds_passes_and_one_above_does_not(
    epsilon: float, delta: float, weights: np.ndarray | None
):
    bounds = divergence_bounds(ORDERS, epsilon, delta, weights)
    known = bounds > 0.0
    assert (
        epsilons(ORDERS, bounds * (1 - 1e-9), delta, weights)[known] <= epsilon * (1 + 1e-9)
    ).all()
    above = bounds * (1 + 1e-9) + 1e-9 * epsilon
    assert (epsilons(ORDERS, above, delta, weights)[known] > epsilon).all()


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, 2.0, math.nan])
def test_a_delta_outside_0_and_1_is_refused(delta: float):
    for convert in (
        lambda: epsilons(ORDERS, np.ones(len(ORDERS)), delta),
        lambda: divergence_bounds(ORDERS, 1.0, delta),
    ):
        with pytest.raises(ValueError, match="delta"):
            convert()
