"""Local training as a site's trainer does it, in this process: for attacks that need many runs."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

from privfl.accounting import PoissonGaussian, epsilon_of, least_noise_multiplier
from privfl.dp.training import LocalTraining, Loss, Recipe
from privfl.noise.randomness import SystemRandomness

# Noise so small that it hides nothing: training as it would be without protection. Clipping is
# switched off by a norm that no gradient reaches.
NO_NOISE, NO_CLIPPING = 1e-12, 1e6


def noise_for(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The least noise multiplier with which so many steps cost at most ``epsilon``."""

    def cost(noise_multiplier: float) -> float:
        event = PoissonGaussian(
            sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, steps=steps
        )
        return epsilon_of([event], delta).upper

    sigma = least_noise_multiplier(cost, epsilon)
    assert sigma is not None, f"no noise reaches epsilon {epsilon}"
    return sigma


def local(
    model: nn.Module,
    loss: Loss,
    records: TensorDataset,
    *,
    sampling_rate: float,
    noise_multiplier: float,
    max_grad_norm: float,
    steps: int,
    lr: float,
) -> LocalTraining:
    """A site's training, with system randomness.

    Args:
        model: trained in place.
        loss: the mean loss of a batch.
        records: the site's training records.
        sampling_rate: the probability with which a record takes part in a step.
        noise_multiplier: deviation of the noise, in clipping norms.
        max_grad_norm: the clipping norm.
        steps: of a round.
        lr: of plain SGD.
    """
    recipe = Recipe(
        sampling_rate=sampling_rate,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        local_steps=steps,
        optimizer="sgd",
        optimizer_options={"lr": lr},
    )
    with warnings.catch_warnings():
        # Of torch's: the inputs of a first layer need no gradient.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        return LocalTraining(model, loss, records, recipe, SystemRandomness(), torch.device("cpu"))


def updates(training: LocalTraining, runs: int) -> NDArray[np.float64]:
    """The updates of independent runs from the same start; shape (runs, parameters).

    The optimizer is plain SGD, which keeps nothing between rounds, so a round is a run.
    """
    start = training.flat()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        return np.stack([training.train_round(start).astype(np.float64) for _ in range(runs)])
