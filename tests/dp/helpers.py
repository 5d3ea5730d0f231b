"""A site's training in a few words, for the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from privfl.dp.training import LocalTraining, Recipe
from privfl.noise.randomness import SystemRandomness

CPU = torch.device("cpu")


def recipe(**changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "sampling_rate": 0.1,
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "local_steps": 5,
        "optimizer": "sgd",
        "optimizer_options": {"lr": 1.0},
    }
    return Recipe(**fields | changes)


def records(count: int = 100, features: int = 5) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, features, generator=generator)
    return TensorDataset(x, (x.sum(dim=1) > 0).long())


def zero_linear(features: int = 5, classes: int = 2) -> nn.Module:
    layer = nn.Linear(features, classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def local(
    model: nn.Module | None = None,
    train: Any = None,
    loss: Any = nn.functional.cross_entropy,
    **changes: Any,
) -> LocalTraining:
    data = records() if train is None else train
    return LocalTraining(
        model or zero_linear(), loss, data, recipe(**changes), SystemRandomness(), CPU
    )


def train_once(trainer: LocalTraining) -> None:
    """One round from where the model stands."""
    trainer.train_round(trainer.flat())
