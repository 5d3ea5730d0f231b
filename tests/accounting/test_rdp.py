"""The accountant against published values, and the properties that every accountant must have."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfl.accounting import PoissonGaussian, RdpAccountant, epsilon_of, least_noise_multiplier
from privfl.errors import PrivflError

# Configurations whose epsilon is published (Abadi et al. 2016; the tutorials of TensorFlow Privacy and Opacus; Bu et al. 2020), with
# the value that Renyi accounting with the improved conversion gives for them: (q, sigma, steps, delta, epsilon).
REFERENCE = [
    ("Abadi 2016", 0.01, 4.0, 10_000, 1e-5, 1.0355),
    ("TF Privacy 1.3/15", 256 / 60_000, 1.3, 15 * 60_000 // 256, 1e-5, 0.9544),
    ("TF Privacy 1.1/60", 256 / 60_000, 1.1, 60 * 60_000 // 256, 1e-5, 2.5966),
    ("TF Privacy 0.7/45", 256 / 60_000, 0.7, 45 * 60_000 // 256, 1e-5, 6.3195),
]


@pytest.mark.parametrize(("name", "q", "sigma", "steps", "delta", "epsilon"), REFERENCE, ids=[row[0] for row in REFERENCE])
def test_published_values(name: str, q: float, sigma: float, steps: int, delta: float, epsilon: float):
    assert epsilon_of([PoissonGaussian(q, sigma, steps)], delta) == pytest.approx(epsilon, abs=6e-5)


# The "classic" column: min over orders of rdp + log(1 / delta) / (order - 1), which the publications used themselves.
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
def test_the_renyi_divergences_give_the_published_classic_values(q: float, sigma: float, steps: int, epsilon: float):
    from privfl.accounting.rdp import _rdp_of_one_step

    orders, rdp = _rdp_of_one_step(q, sigma)
    classic = min(steps * r + math.log(1e5) / (a - 1) for a, r in zip(orders, rdp, strict=True))
    assert classic == pytest.approx(epsilon, abs=6e-5)


# Opacus' own test value: RDP 7.32911117143 with its orders; and its noise multiplier for epsilon 8 over 2249 steps.
def test_opacus_reference():
    assert epsilon_of([PoissonGaussian(0.04, 1.5, 2250)], 1e-5) == pytest.approx(7.32911, abs=1e-3)
    assert least_noise_multiplier(8.0, 1e-5, 0.04, 2249) == pytest.approx(1.416, abs=2e-3)


# RDP of the 12-case table (dp-accounting): (events, delta, epsilon).
TABLE = {
    "A": ([(256 / 6e4, 1.1, 14062)], 1e-5, 2.5966),
    "B": ([(0.01, 4.0, 10_000)], 1e-5, 1.0355),
    "C": ([(1e-3, 0.8, 1000)], 1e-5, 1.1589),
    "D": ([(1.0, 10.0, 100)], 1e-5, 4.7285),
    "F": ([(0.02, 0.5, 5000)], 1e-5, 69.907),
    "G": ([(0.004, 1.0, 10_000)], 1e-10, 3.7669),
    "H": ([(0.5, 5.0, 200)], 1e-5, 7.2318),
    "I": ([(1.0, 5.0, 10), (1.0, 8.0, 20), (1.0, 3.0, 2)], 1e-5, 4.5488),
    "J": ([(1e-4, 10.0, 10)], 1e-5, 0.0035),
    "L": ([(1.0, 20.0, 5), (0.01, 1.0, 500), (0.01, 0.9, 500)], 1e-5, 2.5259),
}


@pytest.mark.parametrize("case", TABLE)
def test_heterogeneous_table(case: str):
    events, delta, epsilon = TABLE[case]
    digits = len(str(epsilon).split(".")[1])
    assert epsilon_of([PoissonGaussian(*event) for event in events], delta) == pytest.approx(epsilon, abs=0.51 * 10**-digits)


rates = st.floats(0.001, 1.0)
noises = st.floats(0.5, 20.0)
counts = st.integers(1, 2000)


@settings(max_examples=20, deadline=None)
@given(rates, noises, counts)
def test_monotone_and_above_the_exact_gaussian(q: float, sigma: float, steps: int):
    import dp_accounting as dpa

    epsilon = epsilon_of([PoissonGaussian(q, sigma, steps)], 1e-5)
    assert epsilon_of([PoissonGaussian(q, sigma, steps + 1)], 1e-5) >= epsilon
    assert epsilon_of([PoissonGaussian(q, sigma * 1.1, steps)], 1e-5) <= epsilon
    assert epsilon_of([PoissonGaussian(q, sigma, steps)], 1e-4) <= epsilon
    exact = dpa.get_epsilon_gaussian(sigma / math.sqrt(steps), 1e-5)
    assert epsilon_of([PoissonGaussian(1.0, sigma, steps)], 1e-5) >= exact - 1e-9


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(rates, noises, counts), min_size=1, max_size=4), st.randoms())
def test_order_and_splitting_change_nothing(history: list[tuple[float, float, int]], random):
    events = [PoissonGaussian(*event) for event in history]
    epsilon = epsilon_of(events, 1e-5)
    pieces = [
        PoissonGaussian(e.sampling_rate, e.noise_multiplier, n) for e in events for n in (e.steps // 3, e.steps - e.steps // 3)
    ]
    random.shuffle(pieces)
    assert epsilon_of(pieces, 1e-5) == pytest.approx(epsilon, rel=1e-12)


def test_edges():
    assert epsilon_of([], 1e-5) == 0.0
    assert epsilon_of([PoissonGaussian(0.1, 1.0, 0)], 1e-5) == 0.0
    assert epsilon_of([PoissonGaussian(0.1, 0.0, 1)], 1e-5) == math.inf
    assert epsilon_of([PoissonGaussian(0.1, 50.0, 1)], 0.5) == 0.0
    accountant = RdpAccountant()
    for delta in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="delta"):
            accountant.epsilon(delta)


@pytest.mark.parametrize(
    ("target", "delta", "q", "steps"), [(2.0, 1e-5, 0.1, 100), (1.0, 1e-4, 0.5, 60), (0.1, 1e-4, 0.3, 60), (50.0, 1e-5, 1.0, 3)]
)
def test_calibration_is_tight_and_never_above(target: float, delta: float, q: float, steps: int):
    noise = least_noise_multiplier(target, delta, q, steps)
    assert epsilon_of([PoissonGaussian(q, noise, steps)], delta) <= target
    assert epsilon_of([PoissonGaussian(q, noise - 2e-4, steps)], delta) > target


def test_an_unreachable_target_says_what_is_reachable():
    with pytest.raises(
        PrivflError, match=r"target_epsilon 1e-06 cannot be reached at delta 1e-05 with 100 steps.*still costs 0\.00"
    ):
        least_noise_multiplier(1e-6, 1e-5, 0.1, 100)


def test_events_survive_storage():
    event = PoissonGaussian(0.1, 1.2345678901234567, 11)
    assert PoissonGaussian.from_dict(event.to_dict()) == event
    for broken in (
        {},
        {**event.to_dict(), "version": 2},
        {**event.to_dict(), "extra": 1},
        {**event.to_dict(), "sampling_rate": 1.5},
    ):
        with pytest.raises(ValueError, match=r"."):
            PoissonGaussian.from_dict(broken)


@pytest.mark.parametrize(
    "fields", [(0.0, 1.0, 1), (1.1, 1.0, 1), (0.5, -1.0, 1), (0.5, math.inf, 1), (0.5, 1.0, -1), (math.nan, 1.0, 1)]
)
def test_impossible_events_are_refused(fields: tuple[float, float, int]):
    with pytest.raises(ValueError, match="must"):
        PoissonGaussian(*fields)
