"""Numbers to integers on a public grid: bounds that hold, and refusals before anything leaves."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from privfl.errors import PrivflError
from privfl.secagg import BoundedIntegers, FixedPoint, derive
from tests.secagg.world import Members

P = derive(4, 16)


@settings(deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=50),
    st.floats(1e-30, 1e30),
    st.integers(12, 28),
    st.sampled_from(["nearest", "stochastic"]),
)
def test_the_error_of_one_value_is_bounded_by_the_grid(
    values: list[float], value_range: float, bits: int, rounding: str
):
    parameters = derive(4, bits)
    grid = FixedPoint(parameters, value_range, rounding)
    vector = np.array([*values, 1.0, -1.0]) * value_range
    grid.check(vector)
    integers = grid.integers(vector)
    assert np.array_equal(integers, np.rint(integers))
    assert np.abs(integers).max() <= parameters.largest_value
    error = np.abs(grid.numbers(integers.astype(np.int64)) - vector).max()
    assert error <= grid.grid * (0.5 if rounding == "nearest" else 1.0) * (1 + 1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_what_is_not_finite_is_refused(bad: float, kind: type):
    vector = np.array([0.5, bad, 0.1], dtype=kind)
    with pytest.raises(PrivflError, match="NaN or infinite"):
        FixedPoint(P, 1.0).check(vector)


def test_what_is_beyond_the_range_is_refused():
    FixedPoint(P, 1.0).check(np.array([1.0, -1.0]))
    with pytest.raises(PrivflError, match="values beyond the public range 1;") as refusal:
        FixedPoint(P, 1.0).check(np.array([0.0, -1.0625]))
    assert "0625" not in str(refusal.value), (
        "the sentence crosses the wire and must not say how far beyond"
    )


@pytest.mark.parametrize("value_range", [0.0, -1.0, 1e-303, 1e308, np.inf, np.nan])
def test_ranges_next_to_the_ends_of_float64_are_refused(value_range: float):
    with pytest.raises(PrivflError, match="public range of a sum must be between"):
        FixedPoint(P, value_range)


def test_integers_that_do_not_fit_are_refused_and_never_wrapped():
    exact = BoundedIntegers(P)
    exact.check(np.array([P.largest_value, -P.largest_value]))
    for bad in (
        P.largest_value + 1,
        -P.largest_value - 1,
        np.iinfo(np.int64).max,
        np.iinfo(np.int64).min,
    ):
        with pytest.raises(PrivflError, match="integers beyond 32767"):
            exact.check(np.array([0, bad]))


def test_nothing_is_encrypted_of_a_vector_that_does_not_fit():
    members = Members(2, 16)
    with pytest.raises(PrivflError, match="integers beyond"):
        members.contributions([np.array([1 << 20]), np.array([0])])


def test_stochastic_rounding_has_no_bias_and_nearest_has():
    for rounding, low, high in (("stochastic", 0.245, 0.255), ("nearest", 0.0, 0.0)):
        grid = FixedPoint(P, float(P.largest_value), rounding)
        mean = grid.integers(np.full(200_000, 0.25)).mean()
        assert low <= mean <= high, rounding


def test_two_members_round_independently():
    values = np.full(100_000, 0.5)
    one, two = (
        FixedPoint(P, float(P.largest_value), "stochastic").integers(values) for _ in range(2)
    )
    assert abs(np.corrcoef(one, two)[0, 1]) < 5 / np.sqrt(len(values))


@pytest.mark.parametrize(
    ("members", "bits", "rounding"),
    [(4, 16, "nearest"), (16, 18, "nearest"), (4, 22, "stochastic")],
)
def test_predicted_against_measured_error_of_a_sum(members: int, bits: int, rounding: str):
    """The sum of n rounding errors: n uniform variates on [-g/2, g/2], or for uniform values n
    triangular ones on [-g, g].
    """
    world = Members(members, bits)
    grid = FixedPoint(world.parameters, 1.0, rounding)
    vectors = [np.random.default_rng(i).uniform(-1, 1, 20_000) for i in range(members)]
    total = world.decode(world.add(world.contributions(vectors, grid), 20_000), 20_000)
    errors = (grid.numbers(total) - np.sum(vectors, axis=0)) / grid.grid
    assert np.abs(errors).max() <= members * (0.5 if rounding == "nearest" else 1.0)
    variance = members / (12 if rounding == "nearest" else 6)
    assert np.var(errors) == pytest.approx(variance, rel=0.05)
    parts = members if rounding == "nearest" else 2 * members
    predicted = np.random.default_rng(99).uniform(-0.5, 0.5, (parts, 20_000)).sum(axis=0)
    assert scipy.stats.ks_2samp(errors, predicted).pvalue > 1e-4
