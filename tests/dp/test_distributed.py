"""A site's share of the noise, the grid of the sums, and what one record can change on it."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from opacus import GradSampleModule
from scipy import stats
from torch import nn

from privfl.dp import clipping
from privfl.dp.clipping import ExampleClipper
from privfl.dp.optimizer import SumOptimizer
from privfl.errors import InternalError, PrivflError
from privfl.noise.discrete_gaussian import DiscreteGaussian
from privfl.noise.distributed import CLIP_MARGIN, SENSITIVITY, DistributedNoise, Shares, StepGrid
from privfl.noise.randomness import SystemRandomness

LEAST_P = 1e-7
# Where not said otherwise: noise multiplier, clipping norm, sites, and how many of them may
# collude.
SIGMA, CLIP, SITES, COLLUSION = 1.3, 0.7, 5, 2

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def distributed(fields: dict[str, Any]) -> DistributedNoise:
    """The noise with these fields, which are taken out of ``fields``."""
    usual = {
        "noise_multiplier": SIGMA,
        "max_grad_norm": CLIP,
        "members": SITES,
        "collusion": COLLUSION,
    }
    return DistributedNoise(**{name: fields.pop(name, value) for name, value in usual.items()})


def grid(**changes: Any) -> StepGrid:
    fields: dict[str, Any] = {
        "value_range": 50.0,
        "largest_total": 2**21 - 1,
        "parameters": 1000,
    } | changes
    return distributed(fields).step_grid(**fields)


def shares(chosen: StepGrid | None = None) -> Shares:
    return Shares(chosen or grid(), SystemRandomness())


def noise_alone(one: Shares, parameters: int, steps: int) -> NDArray[np.float64]:
    """What a site adds to sums of nothing; shape (steps, parameters)."""
    return np.array([one.add(np.zeros(parameters)) for _ in range(steps)], dtype=np.float64)


def fits(values: NDArray[np.float64], deviation: float) -> bool:
    """Whether the sum of squares is one of normal variates with this standard deviation; both
    tails.
    """
    probability = stats.chi2(values.size).cdf(float(((values / deviation) ** 2).sum()))
    return LEAST_P < probability < 1 - LEAST_P


# -- shares of the noise ---------------------------------------------------------------------------


@pytest.mark.parametrize(("sites", "collusion"), [(3, 1), (5, 1), (5, 3), (20, 1), (100, 70)])
def test_a_share_has_the_variance_that_leaves_enough_when_others_are_subtracted(
    sites: int, collusion: int
):
    chosen = grid(members=sites, collusion=collusion)
    values = noise_alone(shares(chosen), 1000, 300) * chosen.step
    assert fits(values, 1.3 * 0.7 / math.sqrt(sites - collusion))
    assert abs(values.mean()) < 5.5 * values.std() / math.sqrt(values.size)
    for slip in (sites, sites - collusion + 1):
        assert not fits(values, 1.3 * 0.7 / math.sqrt(slip)), (
            "the test would not see a slip in the number of sites"
        )


def test_of_all_shares_but_those_that_colluders_subtract_the_accounted_noise_is_left():
    """Seen by k sites that pool their shares, k up to the colluders: sigma C sqrt((n - k) / (n -
    t)).
    """
    chosen = grid()
    every = np.array([noise_alone(shares(chosen), 1000, 200) for _ in range(SITES)]) * chosen.step
    total = every.sum(axis=0)
    for known in range(COLLUSION + 1):
        left = total - every[:known].sum(axis=0)
        assert fits(left, SIGMA * CLIP * math.sqrt((SITES - known) / (SITES - COLLUSION)))
    assert fits(left, SIGMA * CLIP), "after all colluders it is just what the noise multiplier says"
    assert left.std() > SIGMA * CLIP * 0.99


def test_shares_are_independent_across_sites_steps_and_runs():
    parameters, steps = 1000, 200
    first, second = (noise_alone(shares(), parameters, steps) for _ in range(2))
    later = noise_alone(shares(), parameters, steps)
    pairs = {
        "sites": (first, second),
        "runs": (first, later),
        "steps": (first[:-1], first[1:]),
        "elements": (first[:, :-1], first[:, 1:]),
        "sizes at two sites": (np.abs(first), np.abs(second)),
        "sizes in two steps": (np.abs(first[:-1]), np.abs(first[1:])),
    }
    for name, (a, b) in pairs.items():
        r = np.corrcoef(a.ravel(), b.ravel())[0, 1]
        assert abs(r) < 5 / math.sqrt(a.size), name


# -- rounding, and once each -----------------------------------------------------------------------


def test_a_sum_is_rounded_to_the_nearest_step_and_its_share_is_added_exactly():
    chosen = grid()
    one = shares(chosen)
    halves = (np.arange(-50, 50) + 0.5) * chosen.step
    rest = np.random.default_rng(1).normal(size=900) * 10.0 ** np.random.default_rng(2).uniform(
        -6, 1.5, size=900
    )
    total = np.concatenate([halves, rest])
    one.draw_ahead(1000)
    assert one._ahead is not None
    share = one._ahead.copy()
    noisy = one.add(total)
    assert noisy.dtype == np.int64
    rounded = [round(Fraction(x) / Fraction(chosen.step)) for x in total.tolist()]
    assert (noisy - share).tolist() == rounded


def test_every_share_is_used_once(monkeypatch: pytest.MonkeyPatch):
    draw, drawn = DiscreteGaussian.draw, []

    def watch(self: DiscreteGaussian, count: int) -> NDArray[np.int64]:
        drawn.append(draw(self, count))
        return drawn[-1].copy()

    monkeypatch.setattr(DiscreteGaussian, "draw", watch)
    one, nothing = shares(), np.zeros(50)
    one.draw_ahead(50)
    sent = [one.add(nothing) for _ in range(3)]
    one.draw_ahead(50)
    sent.append(one.add(nothing))
    assert len(drawn) == 4
    assert all(np.array_equal(a, b) for a, b in zip(sent, drawn, strict=True))
    assert one.drawn == 4
    assert one._ahead is None
    # One that was drawn for another length is not stretched, cut or kept.
    one.draw_ahead(1)
    assert one.add(nothing).shape == (50,)
    assert one.add(nothing).shape == (50,)
    assert [len(d) for d in drawn[4:]] == [1, 50, 50]
    assert one.drawn == 6


# -- the grid --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value_range", [50.0, 64.0, 0.37, 1e-9, 3e7])
@pytest.mark.parametrize("bits", [12, 16, 22, 27])
def test_the_grid_is_the_finest_of_16_bits_that_holds_the_range(value_range: float, bits: int):
    largest = 2 ** (bits - 1) - 1
    chosen = grid(
        value_range=value_range,
        largest_total=largest,
        max_grad_norm=value_range,
        noise_multiplier=1.0,
        parameters=1,
    )
    fraction, exponent = math.frexp(chosen.step)
    assert math.ldexp(fraction, 16).is_integer()
    assert value_range <= chosen.step * largest
    assert value_range > (chosen.step - math.ldexp(1.0, exponent - 16)) * largest
    assert chosen.deviation == pytest.approx(
        value_range / math.sqrt(SITES - COLLUSION) / chosen.step
    )


def test_a_grid_on_which_rounding_moves_a_sum_too_far_is_refused():
    """What is charged is 1.01 clipping norms: 2^-10 of the hundredth is for clipping, the rest
    for g sqrt(d).
    """
    for_rounding = 1.01 - 1.0 - 2.0**-10
    step = 2.0**-12
    most = int((for_rounding * CLIP / step) ** 2)
    at_most: dict[str, Any] = {
        "value_range": step * 1000,
        "largest_total": 1000,
        "noise_multiplier": 100.0,
    }
    assert grid(parameters=most, **at_most).step == step
    with pytest.raises(
        PrivflError,
        match=r"need a finer grid than the bits of a value allow.*secure_aggregation\.value_bits",
    ):
        grid(parameters=most + 1, **at_most)
    assert (SENSITIVITY, CLIP_MARGIN) == (1.01, 2.0**-10)


def test_sums_are_not_released_for_less_than_they_can_change():
    made = grid()
    assert 1.0 + CLIP_MARGIN < made.sensitivity <= SENSITIVITY
    made.check_charged(made.sensitivity)
    for charged in (made.sensitivity * (1 - 1e-12), 1.0, math.nan):
        with pytest.raises(InternalError, match="on a grid with one of"):
            made.check_charged(charged)


def test_shares_too_narrow_or_too_wide_are_refused():
    step = 2.0**-12
    common: dict[str, Any] = {"value_range": step * 1000, "largest_total": 1000, "parameters": 1}
    narrow = 8 * step * math.sqrt(SITES - COLLUSION) / CLIP
    assert grid(noise_multiplier=narrow * 1.0001, **common).deviation == pytest.approx(
        8.0, rel=1e-3
    )
    with pytest.raises(PrivflError, match=r"a standard deviation of 8 grid steps, between 8 and"):
        grid(noise_multiplier=narrow * 0.9999, **common)
    wide = 2.0**40 / 8 * narrow
    assert grid(noise_multiplier=wide * 0.9999, **common).deviation < 2.0**40
    with pytest.raises(PrivflError, match="grid steps, between 8 and"):
        grid(noise_multiplier=wide * 1.0001, **common)


# -- the range -------------------------------------------------------------------------------------


def derived(**changes: Any) -> float:
    fields: dict[str, Any] = {
        "expected": 30.0,
        "records": 300,
        "parameters": 1000,
        "steps": 5000,
    } | changes
    return distributed(fields).derived_range(**fields)


@pytest.mark.parametrize(
    ("records", "rate"),
    [
        (10**6, 1e-6),
        (1000, 0.001),
        (300, 0.1),
        (300, 0.5),
        (10**5, 0.03),
        (10**7, 0.01),
        (20, 0.9),
        (50, 1.0),
    ],
)
@pytest.mark.parametrize("steps", [1, 10**6])
def test_batches_stay_within_the_range_by_the_exact_binomial_tail(
    records: int, rate: float, steps: int
):
    bound = (
        derived(expected=records * rate, records=records, steps=steps, noise_multiplier=1e-300)
        / CLIP
        / (1 + CLIP_MARGIN)
    )
    assert steps * stats.binom(records, rate).sf(math.floor(bound)) <= 2.0**-41
    # Bernstein's inequality gives away something, but not the range.
    assert bound <= records + 1e-6
    assert bound <= 2.5 * (stats.binom(records, rate).isf(2.0**-41 / steps) + 8)


@pytest.mark.parametrize(("parameters", "steps"), [(1, 1), (1000, 5000), (10**8, 10**6)])
@pytest.mark.parametrize(("members", "collusion"), [(3, 1), (100, 98)])
def test_noise_stays_within_the_range_by_the_exact_normal_tail(
    parameters: int, steps: int, members: int, collusion: int
):
    bound = derived(
        expected=0.0,
        records=0,
        parameters=parameters,
        steps=steps,
        members=members,
        collusion=collusion,
    )
    deviation = SIGMA * CLIP * math.sqrt(members / (members - collusion))
    assert steps * parameters * 2 * stats.norm.sf(bound / deviation) <= 2.0**-41
    assert steps * parameters * 2 * stats.norm.sf(0.9 * bound / deviation) > 2.0**-41


def test_simulated_sums_of_aligned_gradients_stay_within_the_range():
    """Every record of a batch adds its whole clipping norm to one element, at sites with rates
    of their own.
    """
    rng, steps, rates, records = np.random.default_rng(), 200_000, (0.02, 0.1, 0.3), (500, 200, 100)
    expected = sum(r * n for r, n in zip(rates, records, strict=True))
    batches = sum(rng.binomial(n, r, size=steps) for r, n in zip(rates, records, strict=True))
    chosen = grid(members=3, collusion=1)
    noise = sum(noise_alone(shares(chosen), steps, 1)[0] for _ in range(3)) * chosen.step
    bound = derived(
        expected=expected, records=sum(records), parameters=1, steps=steps, members=3, collusion=1
    )
    largest = float(np.abs(batches * CLIP + noise).max())
    assert largest <= bound
    assert largest > 0.4 * bound, "sums do come near it"


# -- what one record can change --------------------------------------------------------------------


class Weights(nn.Module):
    """A model whose per-example gradient is the input itself."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layer = nn.Linear(features, 1, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def clipped_sum(rows: torch.Tensor) -> NDArray[np.float64]:
    """The sum of clipped gradients that a site rounds, of a batch whose gradients are ``rows``."""
    model = GradSampleModule(Weights(rows.shape[1]))
    optimizer = SumOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        clipper=ExampleClipper(exact=True),
        release=None,
        noise_multiplier=0.0,
        max_grad_norm=CLIP,
        expected_batch_size=1,
    )
    model(rows).mean().backward()
    total = optimizer.collect()
    assert total is not None
    return total


def coarsest(parameters: int) -> float:
    """The coarsest step that :meth:`DistributedNoise.step_grid` lets pass."""
    return 2.0 ** math.floor(
        math.log2((SENSITIVITY - 1 - CLIP_MARGIN) * CLIP / math.sqrt(parameters))
    )


def rounded(total: NDArray[np.float64], step: float) -> NDArray[np.int64]:
    """As a site does it, without the share."""
    one = shares(StepGrid(step, 100.0, SENSITIVITY))
    one.draw_ahead(len(total))
    assert one._ahead is not None
    share = one._ahead.copy()
    return one.add(total) - share


def hostile(parameters: int) -> list[torch.Tensor]:
    basis = torch.zeros(parameters)
    basis[0] = 1.0
    equal, random = torch.full((parameters,), 1.0), torch.randn(parameters)
    rows = [
        basis * factor
        for factor in (
            math.inf,
            -math.inf,
            math.nan,
            1e25,
            -1e25,
            3e38,
            1e-30,
            1e-45,
            0.7,
            0.70000005,
            100.0,
        )
    ]
    rows += [
        equal * factor for factor in (math.inf, 1e25, 3e38, 1.0, 1e-3, CLIP / math.sqrt(parameters))
    ]
    rows += [random * factor for factor in (1e-6, 1.0, 1e6, 1e25)]
    mixed = random.clone()
    mixed[-1] = math.nan
    return [*rows, mixed]


@pytest.mark.slow
@pytest.mark.parametrize("parameters", [1, 100, 100_000])
def test_one_record_changes_the_integers_by_at_most_the_charged_sensitivity(parameters: int):
    torch.manual_seed(parameters)
    step = coarsest(parameters)
    most, reached = SENSITIVITY * CLIP / step, 0.0
    base = torch.randn(8, parameters) * 3
    before = rounded(clipped_sum(base), step)
    for row in hostile(parameters):
        after = rounded(clipped_sum(torch.cat([base, row[None]])), step)
        changed = float(np.linalg.norm((after - before).astype(np.float64)))
        assert changed <= most, row[:3]
        reached = max(reached, changed)
    assert reached > 0.98 * CLIP / step, "some records do reach the clipping norm"


@pytest.mark.parametrize("parameters", [1, 100, 100_000])
def test_also_where_every_element_lies_as_badly_as_can_be_for_rounding(parameters: int):
    """Elements just below half a step, all pushed over it: rounding adds almost a whole step to
    each.
    """
    step = coarsest(parameters)
    record = np.full(parameters, CLIP * (1 + CLIP_MARGIN) / math.sqrt(parameters))
    just_below = (0.5 - 1e-6) * step
    into_the_next = (1e-5 - np.mod(record, step) / step) % 1.0 * step
    bases = {
        "crossing": np.full(parameters, just_below),
        "both": np.full(parameters, 0.5 * step) + into_the_next - 2e-6 * step,
    }
    rng = np.random.default_rng(parameters)
    bases["random"] = rng.uniform(-30, 30, size=parameters)
    worst = 0.0
    for base in bases.values():
        for sign in (1, -1):
            changed = rounded(sign * (base + record), step) - rounded(sign * base, step)
            worst = max(worst, float(np.linalg.norm(changed.astype(np.float64))))
    assert worst <= SENSITIVITY * CLIP / step
    assert worst > CLIP / step, "rounding does make it more than the clipping norm"


def test_sums_are_taken_in_float64(monkeypatch: pytest.MonkeyPatch):
    """In float32 a sum of 10^5 records loses more than one record may change, and loses it in
    another way with one record more.
    """
    monkeypatch.setattr(clipping, "_PIECE", 5000)
    rows = torch.rand(100_000, 2, generator=torch.Generator().manual_seed(1)) * 0.4
    total = clipped_sum(rows)
    exact = [math.fsum(column) for column in rows.double().T.tolist()]
    assert total.tolist() == pytest.approx(exact, rel=1e-13)
