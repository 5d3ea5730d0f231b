"""The batches that are really trained on: every record takes part by itself, at its rate, in
every step anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import nn
from torch.utils.data import TensorDataset

from privfl.dp import training
from privfl.dp.sampling import PoissonBatches
from privfl.noise.randomness import SystemRandomness
from tests.dp.helpers import local

RECORDS, RATE, STEPS = 60, 0.23, 1000
LEAST_P = 1e-7


class Weights(nn.Module):
    """Its per-example gradient is the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(RECORDS, 1, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def from_sums(steps: int = STEPS, rate: float = RATE) -> NDArray[np.bool_]:
    """Of records that are the unit vectors, a sum of gradients is the list of who took part;
    shape (steps, records).
    """
    data = TensorDataset(torch.eye(RECORDS), torch.zeros(RECORDS))
    trainer = local(
        Weights(),
        data,
        lambda out, _: out.mean(),
        sampling_rate=rate,
        noise_multiplier=None,
        local_steps=1,
    )
    sums = np.array([trainer.sum_gradients(trainer.flat()) for _ in range(steps)])
    assert trainer.draws == steps
    assert set(np.unique(sums)) <= {0.0, 1.0}, "nobody takes part twice"
    return sums == 1.0


def from_batches(steps: int = STEPS, rate: float = RATE) -> NDArray[np.bool_]:
    """The same of the loader for a user's own loop, in passes of a hundred."""
    passes, each = max(1, steps // 100), min(steps, 100)
    batches = PoissonBatches(RECORDS, rate, each, SystemRandomness(), ahead=True)
    begun: list[int] = []
    batches.begun = lambda number: begun.append(number)
    taken = np.zeros((steps, RECORDS), dtype=np.int64)
    for number in range(passes):
        for step, batch in enumerate(batches, number * each):
            np.add.at(taken[step], batch, 1)
    assert len(begun) == passes
    assert taken.max() <= 1, "nobody takes part twice"
    return taken == 1


WAYS = pytest.mark.parametrize(
    "taken_of", [from_sums, from_batches], ids=["sums of gradients", "a user's loop"]
)
Way = Callable[..., NDArray[np.bool_]]


def correlation(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """In units of what chance makes."""
    return abs(float(np.corrcoef(a.ravel(), b.ravel())[0, 1])) * math.sqrt(a.size)


@pytest.mark.slow
@WAYS
def test_batch_sizes_are_binomial(taken_of: Way):
    sizes = taken_of().sum(axis=1)
    binomial = stats.binom(RECORDS, RATE)
    low, high = int(binomial.ppf(0.01)), int(binomial.ppf(0.99))
    counts = np.bincount(np.clip(sizes, low, high) - low, minlength=high - low + 1)
    expected = binomial.pmf(np.arange(low, high + 1))
    expected[0], expected[-1] = binomial.cdf(low), binomial.sf(high - 1)
    assert stats.chisquare(counts, expected * STEPS).pvalue > LEAST_P
    assert len(np.unique(sizes)) > 10, "a batch of fixed size is not what is accounted for"


@pytest.mark.slow
@WAYS
def test_every_record_takes_part_at_the_rate(taken_of: Way):
    often = taken_of().sum(axis=0)
    chi2 = float(((often - STEPS * RATE) ** 2 / (STEPS * RATE * (1 - RATE))).sum())
    assert LEAST_P < stats.chi2(RECORDS).cdf(chi2) < 1 - LEAST_P


@pytest.mark.slow
@WAYS
def test_who_takes_part_is_independent_across_sites_steps_and_records(taken_of: Way):
    torch.manual_seed(0)
    first = taken_of()
    torch.manual_seed(0)
    second = taken_of()
    assert correlation(first, second) < 5.5
    for lag in (1, 2, 7, 100):
        assert correlation(first[:-lag], first[lag:]) < 5.5
    for lag in (1, 2, RECORDS // 2):
        assert correlation(first[:, :-lag], first[:, lag:]) < 5.5
    # Sizes of batches too: at one site small where at the other large would not show record by
    # record.
    sizes, others = (taken.sum(axis=1).astype(np.float64) for taken in (first, second))
    assert abs(np.corrcoef(sizes, others)[0, 1]) < 5.5 / math.sqrt(STEPS)


@WAYS
def test_rate_one_takes_all(taken_of: Way):
    assert taken_of(steps=5, rate=1.0).all()


def test_empty_batches_are_sums_of_nothing_and_counted():
    taken = from_sums(steps=200, rate=1.0 / RECORDS)
    empty = int((~taken.any(axis=1)).sum())
    assert stats.binomtest(empty, 200, (1 - 1 / RECORDS) ** RECORDS).pvalue > LEAST_P


def test_a_batch_that_is_gone_through_in_pieces_is_the_same_batch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "_GRADIENT_BYTES", 4 * RECORDS * 7)
    assert from_sums(steps=3, rate=1.0).all()
    sizes = from_sums(steps=100, rate=0.5).sum(axis=1)
    assert stats.binomtest(int(sizes.sum()), 100 * RECORDS, 0.5).pvalue > LEAST_P
