"""What goes wrong at one rank of a loop with other sites: it ends at all of them, at once and
with the same sentence.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import privfl
from privfl.ledger import Ledger
from privfl.transport import connect
from tests.api.test_engine import linear, made, records, step, together
from tests.api.test_engine_misuse import Centred
from tests.conftest import in_threads


def _outcomes(part: Callable[[Any], Any]) -> list[str]:
    return [str(result) for result in in_threads(connect(3), part)]


def test_a_budget_that_ends_at_one_site_ends_the_step_at_all(tmp_path: Path):
    def part(transport: Any) -> None:
        budget = (8.0 if transport.rank == 1 else 100.0, 1e-5)
        own = privfl.PrivacyEngine(
            site=f"s{transport.rank}",
            comm=transport,
            ledger=tmp_path / f"{transport.rank}.l",
            budget=budget,
        )
        model, optimizer, loader = made(own, records(transport.rank))
        for x, y in itertools.chain.from_iterable(itertools.repeat(loader, 100)):
            step(model, optimizer, x, y)

    sentences = _outcomes(part)
    assert all("does not admit 1 more step;" in text for text in sentences), sentences
    charged = [
        sum(Ledger.read(tmp_path / f"{rank}.l").steps("training").values()) for rank in range(3)
    ]
    assert charged[0] == charged[2] == charged[1] + 1, (
        "a refused step is not charged where it was refused"
    )


@pytest.mark.parametrize(
    ("one", "sentence"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier must be between 0.01 and 16384"),
        ({"colour": "red"}, "make_private takes no colour"),
        ({"model": Centred()}, "output for a record depends on"),
    ],
)
def test_what_is_wrong_at_one_rank_is_one_sentence_at_all(one: dict[str, Any], sentence: str):
    sentences = _outcomes(
        lambda t: made(
            privfl.PrivacyEngine(site=f"s{t.rank}", comm=t),
            records(t.rank),
            **(one if t.rank == 1 else {}),
        )
    )
    assert all(sentence in text for text in (sentences[0], sentences[2])), sentences


def test_more_steps_than_a_target_allows_at_other_ranks_are_one_sentence_at_all():
    """Rank 1 has small batches, so that all must step more often than ranks 0 and 2 asked for."""

    def part(transport: Any) -> None:
        model = linear()
        privfl.PrivacyEngine(site=f"s{transport.rank}", comm=transport).make_private_with_epsilon(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(
                records(transport.rank), batch_size=1 if transport.rank == 1 else 20
            ),
            target_epsilon=0.00351,
            target_delta=1e-5,
            epochs=1,
            max_grad_norm=1.0,
        )

    sentences = _outcomes(part)
    assert all(
        "target_epsilon 0.00351 cannot be reached with 1 epoch," in text for text in sentences
    ), sentences


def test_a_ledger_that_cannot_be_written_at_one_rank_is_one_sentence_at_all(tmp_path: Path):
    def part(transport: Any) -> None:
        folder = tmp_path / "missing" if transport.rank == 1 else tmp_path
        own = privfl.PrivacyEngine(
            site=f"s{transport.rank}", comm=transport, ledger=folder / f"{transport.rank}.l"
        )
        made(own, records(transport.rank))

    sentences = _outcomes(part)
    assert all(str(tmp_path / "missing") in text for text in sentences), sentences


def test_a_step_that_fails_at_one_rank_ends_at_all():
    def part(transport: Any) -> None:
        model, optimizer, loader = made(
            privfl.PrivacyEngine(site=f"s{transport.rank}", comm=transport), records(transport.rank)
        )
        for x, y in loader:
            optimizer.zero_grad()
            if transport.rank != 2:
                nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    sentences = _outcomes(part)
    sentence = "optimizer.step() without gradients of 2 trained parameters"
    assert all(sentence in text for text in sentences), sentences


def test_frozen_parameters_must_be_the_same_everywhere():
    def model(rank: int) -> nn.Module:
        layers = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
        nn.init.constant_(layers[0].weight, float(rank == 1)), nn.init.zeros_(layers[0].bias)
        layers[0].requires_grad_(False)
        return layers

    sentences = _outcomes(
        lambda t: made(
            privfl.PrivacyEngine(site=f"s{t.rank}", comm=t), records(t.rank), model=model(t.rank)
        )
    )
    assert all("what is not trained in the model" in text for text in sentences), sentences


def test_a_summed_loss_is_not_divided(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "privfl.noise.discrete_gaussian.DiscreteGaussian.draw",
        lambda self, count: np.zeros(count, dtype=np.int64),
    )

    def part(transport: Any, reduction: str) -> torch.Tensor:
        own = privfl.PrivacyEngine(site=f"s{transport.rank}", comm=transport)
        model, optimizer, loader = made(
            own, records(transport.rank), batch=60, loss_reduction=reduction
        )
        x, y = next(iter(loader))
        nn.functional.cross_entropy(model(x), y, reduction=reduction).backward()
        optimizer.step()
        return torch.cat([p.grad.reshape(-1) for p in optimizer.params])

    mean, total = (together(lambda t, r=r: part(t, r))[0] for r in ("mean", "sum"))
    assert torch.allclose(total, 180 * mean, rtol=1e-4)
