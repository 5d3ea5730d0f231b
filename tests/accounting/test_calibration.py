"""How much noise a target needs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfl.accounting import (
    LARGEST_NOISE_MULTIPLIER,
    LEAST_NOISE_MULTIPLIER,
    epsilon_of,
    least_noise_multiplier,
)
from tests.accounting.histories import steps_of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "delta", "q", "steps"),
    [(2.0, 1e-5, 0.1, 100), (1.0, 1e-4, 0.5, 60), (0.1, 1e-4, 0.3, 60), (50.0, 1e-5, 1.0, 3)],
)
def test_calibration_is_tight_and_never_above(target: float, delta: float, q: float, steps: int):
    def epsilon(noise: float) -> float:
        return epsilon_of([steps_of(q, noise, steps)], delta).upper

    noise = least_noise_multiplier(epsilon, target)
    assert noise == round(noise, 4)
    assert epsilon(noise) <= target < epsilon(noise - 2e-4)


def test_calibration_by_opacus():
    """Opacus needs 1.416 for epsilon 8 at q = 0.04 over 2249 steps."""
    noise = least_noise_multiplier(
        lambda noise: epsilon_of([steps_of(0.04, noise, 2249)], 1e-5).upper, 8.0
    )
    assert noise == pytest.approx(1.416, abs=1e-3)


@pytest.mark.slow
def test_calibration_of_the_exact_gaussian():
    """The noise for epsilon 1 at 1e-5 is 3.7306316 (Balle and Wang 2018); the answer is the next
    one up with four decimals.
    """
    noise = least_noise_multiplier(
        lambda noise: epsilon_of([steps_of(1.0, noise)], 1e-5, "pld", 1e-4).upper, 1.0
    )
    assert noise == 3.7307


def test_an_unreachable_target_is_none():
    asked = []

    def epsilon(noise: float) -> float:
        asked.append(noise)
        return epsilon_of([steps_of(0.1, noise, 100)], 1e-5).upper

    assert least_noise_multiplier(epsilon, 1e-6) is None
    assert asked[-1] == LARGEST_NOISE_MULTIPLIER


@pytest.mark.parametrize(
    "answer",
    [
        LEAST_NOISE_MULTIPLIER,
        0.0101,
        0.5,
        0.9999,
        1.0,
        1.0001,
        2.0,
        1000.1234,
        LARGEST_NOISE_MULTIPLIER,
    ],
)
def test_every_answer_can_be_found(answer: float):
    assert least_noise_multiplier(lambda noise: 2.0 if noise < answer else 1.0, 1.0) == answer


@given(st.floats(1e-3, 1e3), st.floats(0.2, 4.0), st.floats(1e-3, 1e3), st.floats(0.0, 2.0))
def test_it_is_the_least_on_the_grid(scale: float, power: float, target: float, none_below: float):
    """Of any curve that falls, also one that is infinite for a while and nothing from somewhere
    on.
    """

    def epsilon(noise: float) -> float:
        return math.inf if noise < none_below else scale * noise**-power if noise < 5000.0 else 0.0

    noise = least_noise_multiplier(epsilon, target)
    assert noise is not None
    assert epsilon(noise) <= target
    assert noise == LEAST_NOISE_MULTIPLIER or epsilon(round(noise * 1e4 - 1) / 1e4) > target
