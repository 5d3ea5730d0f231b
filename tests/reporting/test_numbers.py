"""Epsilons in words and digits: rounded up, never down."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfl.reporting.html import share, times, within
from privfl.reporting.numbers import plain, up
from privfl.reporting.plots import after_runs
from tests.reporting.pages import site_report


@given(st.floats(min_value=1e-300, max_value=1e300))
def test_an_epsilon_is_never_rounded_down(value: float):
    shown = float(up(value))
    assert value <= shown <= value * 1.0011


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.97101, "1.972"),
        (0.1, "0.1"),
        (3.0, "3"),
        (0.0, "0"),
        (9.9991, "10"),
        (12345.6, "12350"),
        (2e-7, "2e-07"),
        (1234567.0, "1.235e+09"),
    ],
)
def test_epsilons_have_four_digits(value: float, shown: str):
    assert up(value) == shown.replace("1.235e+09", "1235000")


def test_what_is_no_number_is_said():
    assert up("infinite") == up(math.inf) == "infinite"
    assert up(math.nan) == plain(math.nan) == "unknown"
    assert times("infinite") == "no bound"
    assert share("infinite", 3.0) == 100.0


def test_rounding_up_does_not_overdraw_a_budget():
    assert within(1.23456, 1.2345678) == "1.2345678"
    assert within(1.23461, 1.2345678) == "1.235"
    assert within(1.2, 3.0) == "1.2"
    assert share(2.99999, 3.0) == 100.0
    assert share(1.0, 3.0) == 33.4


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0, 3.0, 7.7, 13.0])
def test_the_odds_are_an_upper_bound(epsilon: float):
    assert math.exp(epsilon) <= float(times(epsilon).replace(",", "")) <= math.exp(epsilon) * 1.011


def test_where_a_curve_is_thinned_out_a_run_ends_at_the_next_point():
    account = site_report(runs=2, points=4).accounts[0]
    numbers = {charge.run: i for i, charge in enumerate(account.charges, 1)}
    assert [epsilon for _, epsilon in after_runs(account, numbers)] == [
        account.curve[1].epsilon,
        account.curve[3].epsilon,
    ]
    wide = account.model_copy(
        update={"curve": [p.model_copy(update={"charge": 5 * p.charge}) for p in account.curve]}
    )
    assert [epsilon for _, epsilon in after_runs(wide, numbers)] == [
        account.curve[2].epsilon,
        account.curve[3].epsilon,
    ]
