"""Noise and samples come from the operating system, in every process anew, and a step is a step
also without records.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from privfl.noise.randomness import SeededRandomness, SystemRandomness, gaussian, poisson_sample
from tests.dp.helpers import local, records

# -- where the randomness comes from ---------------------------------------------------------------

# A fresh process that does what users do: seed torch's global generator, the same everywhere.
_NOISE = """
import json, sys, torch
from torch import nn
from tests.dp.helpers import local, zero_linear, records
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer

def ours(**changes):
    torch.manual_seed(0)
    training = local(**changes)
    return training.train_round(training.flat()).tolist()

def opacus(generator):
    torch.manual_seed(0)
    model = GradSampleModule(zero_linear())
    opt = DPOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=1.0,
                      max_grad_norm=1.0, expected_batch_size=10,
                      generator=generator)
    x, y = records().tensors
    nn.functional.cross_entropy(model(x), y).backward()
    opt.step()
    return next(model.parameters()).flatten().tolist()

# All records in every step: only the noise can differ. Hardly any noise: only the samples can.
json.dump({"our noise": ours(sampling_rate=1.0), "our samples": ours(noise_multiplier=1e-9),
           "unseeded generator": opacus(torch.Generator()), "global generator": opacus(None)},
          sys.stdout)
"""


@pytest.fixture(scope="module")
def two_processes() -> list[dict[str, list[float]]]:
    """What each of two fresh processes computed."""
    jobs = [
        subprocess.run([sys.executable, "-c", _NOISE], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    return [json.loads(job.stdout) for job in jobs]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["our noise", "our samples"])
def test_two_processes_with_the_same_torch_seed_differ(
    two_processes: list[dict[str, list[float]]], what: str
):
    first, second = (np.array(process[what]) for process in two_processes)
    # Not by rounding: by as much as the noise, or another sample, makes.
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("trap", ["unseeded generator", "global generator"])
def test_the_trap_is_real_without_our_optimizer(
    two_processes: list[dict[str, list[float]]], trap: str
):
    first, second = (process[trap] for process in two_processes)
    assert first == second, "Opacus no longer has this trap; our defence may be superfluous"


def test_system_noise_is_normal_and_independent():
    noise = gaussian(200_000, 2.0, SystemRandomness())
    assert stats.kstest(noise, stats.norm(scale=2.0).cdf).pvalue > 1e-6
    other = gaussian(200_000, 2.0, SystemRandomness())
    assert abs(np.corrcoef(noise, other)[0, 1]) < 5 / math.sqrt(200_000)


def test_seeded_randomness_repeats_and_says_so():
    one, two, other = SeededRandomness(1, "a"), SeededRandomness(1, "a"), SeededRandomness(1, "b")
    first = one.bytes(64)
    assert first == two.bytes(64)
    assert first != other.bytes(64)
    assert (one.private, SystemRandomness().private) == (False, True)


# -- sampling --------------------------------------------------------------------------------------


def test_batches_are_binomial_with_the_q_that_was_given():
    """q is not batch / records: 1050 records and q = 0.31 have no batch size that gives it."""
    count, q, draws = 1050, 0.31, 2000
    included = np.zeros(count)
    sizes = []
    for _ in range(draws):
        batch = poisson_sample(count, q, SystemRandomness())
        assert len(np.unique(batch)) == len(batch)
        included[batch] += 1
        sizes.append(len(batch))
    variance = q * (1 - q)
    assert abs(np.mean(sizes) - count * q) < 5 * math.sqrt(count * variance / draws)
    assert np.var(sizes) == pytest.approx(count * variance, rel=0.2)
    chi2 = float((((included - draws * q) ** 2) / (draws * variance)).sum())
    assert 1e-6 < stats.chi2(count).cdf(chi2) < 1 - 1e-6


def test_the_denominator_is_q_times_n_and_never_the_batch():
    trainer = local(sampling_rate=0.123)
    assert trainer.optimizer.expected_batch_size == pytest.approx(12.3)


def test_full_batches_at_rate_one():
    assert poisson_sample(7, 1.0, SystemRandomness()).tolist() == list(range(7))


def test_empty_batches_are_steps_with_noise_that_user_code_never_sees():
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        assert len(output) > 0
        return nn.functional.cross_entropy(output, target)

    trainer = local(train=records(20), loss=loss, sampling_rate=0.05, local_steps=200)
    update = trainer.train_round(trainer.flat())
    assert trainer.draws == 200
    # P(batch empty) = 0.95^20 = 0.36: if only batches with records were steps, about 128 would be
    # counted.
    assert np.isfinite(update).all()
