"""Bounds against closed forms, published ceilings, and their own promise: they hold as often as
they say.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from privacy_audits.bounds import clopper_pearson, gaussian, membership, one_run, roc, tests
from privacy_audits.bounds.membership import Confidences
from privacy_audits.bounds.one_run import Guesses
from privacy_audits.bounds.thresholds import Bonferroni

DELTA = 1e-5


@pytest.mark.parametrize(
    ("canaries", "ceiling", "with_delta"),
    [(100, 3.49, None), (1000, 5.81, None), (10_000, 8.11, 7.83)],
)
def test_the_ceilings_of_one_run(canaries: int, ceiling: float, with_delta: float | None):
    perfect = Guesses(canaries, canaries, canaries)
    assert one_run.epsilon(perfect, 0.0, 0.05) == pytest.approx(ceiling, abs=0.005)
    assert -math.log(0.05 ** (-1 / canaries) - 1) == pytest.approx(ceiling, abs=0.005)
    if with_delta is not None:
        assert one_run.epsilon(perfect, DELTA, 0.05) == pytest.approx(with_delta, abs=0.005)


def test_the_gaussian_curve():
    # delta of mu = 1 at epsilon 1 is Phi(-1/2) - e Phi(-3/2).
    exact = stats.norm.cdf(-0.5) - math.e * stats.norm.cdf(-1.5)
    assert gaussian.delta_of(1.0, 1.0) == pytest.approx(exact, rel=1e-12)
    assert gaussian.epsilon_of(1.0, 1e-5) == pytest.approx(4.3771781, abs=1e-6)
    for epsilon in (0.1, 1.0, 8.0, 50.0):
        mu = gaussian.mu_of(epsilon, DELTA)
        assert gaussian.epsilon_of(mu, DELTA) == pytest.approx(epsilon, rel=1e-6)
    assert gaussian.epsilon_of(1e-7, DELTA) == 0.0


def test_clopper_pearson_has_its_coverage_exactly():
    """For every true rate, the probability that the bound fails is at most alpha."""
    for n, alpha in ((20, 0.05), (200, 0.01)):
        uppers = np.array([clopper_pearson.upper(k, n, alpha) for k in range(n + 1)])
        for rate in (0.01, 0.1, 0.5, 0.9):
            failed = stats.binom.pmf(np.arange(n + 1), n, rate)[uppers < rate].sum()
            assert failed <= alpha
    assert clopper_pearson.lower(0, 10, 0.05) == 0.0
    assert clopper_pearson.upper(10, 10, 0.05) == 1.0


def scores_of(mu: float, canaries: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """What an ideal attack on a Gaussian mechanism sees of each canary."""
    took_part = rng.random(canaries) < 0.5
    return rng.normal(size=canaries) + mu * took_part, took_part


BOUNDS: dict[str, Callable[[Guesses, float], float]] = {
    "every mechanism": lambda g, alpha: one_run.epsilon(g, DELTA, alpha),
    "Gaussian": lambda g, alpha: one_run.gaussian_epsilon(g, DELTA, alpha),
}


@pytest.mark.slow
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_one_run_bounds_stay_below_the_truth(bound: str, epsilon: float):
    """In 95 % of repetitions, and here in nearly all: the bounds are far from tight."""
    rng, mu = np.random.default_rng(7), gaussian.mu_of(epsilon, DELTA)
    above = sum(
        Bonferroni.halves(1000).bound(*scores_of(mu, 1000, rng), BOUNDS[bound], 0.05) > epsilon
        for _ in range(60)
    )
    assert above <= 60 * 0.05 + 3 * math.sqrt(60 * 0.05 * 0.95)


@pytest.mark.slow
def test_the_distinguishers_bounds_stay_below_the_truth():
    rng, epsilon = np.random.default_rng(8), 1.0
    mu = gaussian.mu_of(epsilon, DELTA)
    runs, above = 1000, {"mu": 0, "epsilon": 0}
    for _ in range(200):
        # The threshold is fixed beforehand, halfway.
        false_positives = int(rng.binomial(runs, stats.norm.sf(mu / 2)))
        false_negatives = int(rng.binomial(runs, stats.norm.cdf(-mu / 2)))
        rates = (false_positives, runs, false_negatives, runs)
        above["mu"] += gaussian.mu_from_rates(*rates, 0.05) > mu
        above["epsilon"] += clopper_pearson.epsilon_from_rates(*rates, DELTA, 0.05) > epsilon
    assert max(above.values()) <= 200 * 0.05


# Notes of the field, measured with ideal canaries (q = 1, T = 50, delta 1e-5, 95 %): claimed
# epsilon, one-run bound at 1000 and 5000 canaries, and with half the noise.
POWER = [(1.0, 0.21, 0.31, 0.70, 0.92), (2.0, 0.52, 0.84, 1.61, 1.94)]


@pytest.mark.slow
@pytest.mark.parametrize(("epsilon", "m1000", "m5000", "half1000", "half5000"), POWER)
def test_the_power_of_one_run(
    epsilon: float, m1000: float, m5000: float, half1000: float, half5000: float
):
    rng, mu = np.random.default_rng(9), gaussian.mu_of(epsilon, DELTA)
    for canaries, factor, expected in (
        (1000, 1, m1000),
        (5000, 1, m5000),
        (1000, 2, half1000),
        (5000, 2, half5000),
    ):
        bounds = [
            Bonferroni.halves(canaries).bound(
                *scores_of(factor * mu, canaries, rng), BOUNDS["every mechanism"], 0.05
            )
            for _ in range(20)
        ]
        # The notes have the RDP noise of that epsilon, which is a little more than the exact one.
        assert np.mean(bounds) == pytest.approx(expected, abs=0.35)


def test_the_gaussian_refutation_needs_more_than_the_truth():
    rng = np.random.default_rng(10)
    scores, took_part = scores_of(gaussian.mu_of(2.0, DELTA), 1000, rng)
    guesses = one_run.guess(scores, took_part, 500)
    assert not one_run.refutes_gaussian(guesses, gaussian.mu_of(2.0, DELTA), 0.05)
    twice, took_part = scores_of(2 * gaussian.mu_of(2.0, DELTA), 1000, rng)
    assert one_run.refutes_gaussian(
        one_run.guess(twice, took_part, 500), gaussian.mu_of(1.0, DELTA), 0.05
    )


def test_guesses():
    scores = np.array([5.0, 1.0, 3.0, 2.0, 4.0, 0.0])
    took_part = np.array([True, False, True, False, False, False])
    assert one_run.guess(scores, took_part, 4) == Guesses(6, 4, 3)
    assert one_run.guess(scores, took_part, 5).made == 4
    with pytest.raises(ValueError, match="impossible"):
        Guesses(5, 6, 6)
    assert one_run.epsilon(Guesses(10, 10, 5), 0.0, 0.05) == 0.0


def test_roc():
    rng = np.random.default_rng(11)
    positives, negatives = rng.normal(1.0, 1.0, 4000), rng.normal(0.0, 1.0, 4000)
    exact = float(stats.norm.cdf(1 / math.sqrt(2)))
    assert roc.auroc(positives, negatives) == pytest.approx(exact, abs=0.02)
    assert roc.auroc(np.ones(5), np.ones(7)) == 0.5
    assert roc.tpr_at_fpr(np.array([3.0, 1.0]), np.array([2.0, 0.0]), 0.0) == 0.5
    assert roc.tpr_at_fpr(positives, negatives, 0.01) == pytest.approx(
        float(stats.norm.sf(stats.norm.isf(0.01) - 1)), abs=0.04
    )
    low, high = roc.bootstrap(roc.auroc, positives, negatives, rng, 100)
    assert low < exact < high


def test_sums_of_masked_numbers_wrap_by_chance_and_others_do_not():
    rng = np.random.default_rng(4)
    for members in (2, 3, 5):
        masked = rng.uniform(-0.5, 0.5, (members, 30_000)).sum(axis=0)
        assert tests.wrapping(masked, members).p_value > 1e-4
        plain = rng.normal(0.0, 0.05, (members, 30_000)).sum(axis=0)
        assert tests.wrapping(plain, members).p_value < 1e-12


# -- scores of membership --------------------------------------------------------------------------


def said_of(
    effect: float, rng: np.random.Generator
) -> tuple[Confidences, Confidences, np.ndarray, np.ndarray]:
    """Confidences of models whose members gain ``effect``, among records of very different
    difficulty; and of a population. Then who was in the shadow models, and who in the attacked one.
    """
    inside = rng.random((17, 2000)) < 0.5
    said = rng.normal(0.0, 4.0, 2000) + rng.normal(size=inside.shape) + effect * inside
    others = rng.normal(0.0, 4.0, 800) + rng.normal(size=(17, 800))
    return (
        Confidences(said[0], said[1:]),
        Confidences(others[0], others[1:]),
        inside[1:],
        inside[0],
    )


@pytest.mark.parametrize("effect", [0.0, 1.5])
def test_membership_scores_tell_members_if_there_is_an_effect(effect: float):
    records, population, members, took_part = said_of(effect, np.random.default_rng(14))
    # The best that is possible, of one confidence with known means.
    ideal = float(stats.norm.cdf(effect / math.sqrt(2)))
    for scores, short_of in (
        (membership.lira(records, members), 0.06),
        # Its ratio is the attacked model's to a mean that half the shadows raise.
        (membership.rmia(records, population), 0.1),
    ):
        area = roc.auroc(scores[took_part], scores[~took_part])
        assert ideal - short_of < area < ideal + 0.03
    if effect:
        # Without shadow models the difficulty of records hides it.
        by_itself = roc.auroc(records.attacked[took_part], records.attacked[~took_part])
        assert by_itself < ideal - 0.2


def test_rmia_is_the_share_of_others_with_a_smaller_ratio():
    records, population, _, _ = said_of(1.0, np.random.default_rng(15))

    def ratio(said: Confidences) -> np.ndarray:
        return stats.logistic.cdf(said.attacked) / stats.logistic.cdf(said.shadows).mean(0)

    pairwise = (ratio(records)[:, None] / ratio(population)[None] >= 1.0).mean(1)
    assert membership.rmia(records, population) == pytest.approx(pairwise, abs=1e-12)


def test_confidences():
    logits = np.array([[2.0, 0.0, 0.0], [0.0, 1000.0, 0.0]])
    assert membership.confidences(logits, np.array([0, 1])) == pytest.approx(
        [2.0 - math.log(2.0), 1000.0 - math.log(2.0)]
    )
    assert logits[0, 0] == 2.0


# -- tests of noise and samples --------------------------------------------------------------------

RNG = np.random.default_rng(12)
NORMAL = RNG.normal(size=(40, 2000))


@pytest.mark.parametrize(
    ("outcome", "wrong"),
    [
        (tests.variance(NORMAL, 1.0), tests.variance(0.95 * NORMAL, 1.0)),
        (tests.mean(NORMAL, 0.0, 1.0), tests.mean(NORMAL + 0.03, 0.0, 1.0)),
        (tests.normality(NORMAL, 1.0), tests.normality(RNG.uniform(-1.732, 1.732, 80_000), 1.0)),
        (
            tests.correlation([(NORMAL[0], NORMAL[1]), (NORMAL[2], NORMAL[3])]),
            tests.correlation([(NORMAL[0], NORMAL[1]), (NORMAL[2], NORMAL[2] + NORMAL[3])]),
        ),
        (tests.rate(5030, 10_000, 0.5), tests.rate(5300, 10_000, 0.5)),
        (
            tests.spread(RNG.binomial(400, 0.3, 200), 400, 0.3),
            tests.spread(np.full(200, 120), 400, 0.3),
        ),
        (tests.uniformity(RNG.random(5000)), tests.uniformity(RNG.random(5000) ** 1.2)),
    ],
    ids=["variance", "mean", "normality", "correlation", "rate", "spread", "uniformity"],
)
def test_each_test_notices_its_fault_and_no_other(outcome: tests.Outcome, wrong: tests.Outcome):
    assert outcome.p_value > 1e-3
    assert wrong.p_value < 1e-6


def test_constant_numbers_are_as_alike_as_can_be():
    assert tests.correlation([(np.zeros(50), np.zeros(50))]).p_value < 1e-9


def test_powers_are_those_of_the_tests():
    rng, level = np.random.default_rng(13), 1e-3
    noticed = sum(tests.variance(rng.normal(0, 1.1, 1000), 1.0).p_value < level for _ in range(400))
    assert noticed / 400 == pytest.approx(tests.power_of_variance(1000, 1.1, level), abs=0.08)
    noticed = sum(
        tests.rate(int(rng.binomial(2000, 0.54)), 2000, 0.5).p_value < level for _ in range(400)
    )
    assert noticed / 400 == pytest.approx(tests.power_of_rate(2000, 0.5, 0.54, level), abs=0.08)
