"""The optimizer around a clipper and a release: what is charged, when, and what an interruption
leaves behind. Whatever the clipper, the same holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from opacus import GradSampleModule
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader

from privfl.dp import optimizer as dp_optimizer
from privfl.dp.clipping import ExampleClipper
from privfl.dp.ghost import GhostClipper, GhostModule
from privfl.dp.optimizer import OwnNoise, Release, SumOptimizer, SumOverSites
from privfl.errors import InternalError, PrivflError
from privfl.noise.distributed import CLIP_MARGIN
from privfl.noise.randomness import SystemRandomness
from tests.dp.helpers import records, zero_linear

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")

X, Y = records(20).tensors
BOTH = pytest.mark.parametrize("clipping", ["hooks", "ghost"])


class Recorded:
    """A release without noise that remembers what it was handed."""

    def __init__(self) -> None:
        self.sums: list[torch.Tensor] = []
        self.deviations: list[float] = []
        self.aborted: list[BaseException] = []

    def noisy(self, totals: Sequence[torch.Tensor], deviation: float) -> list[torch.Tensor]:
        self.sums.append(torch.cat([total.reshape(-1) for total in totals]).double())
        self.deviations.append(deviation)
        return list(totals)

    def abort(self, error: BaseException) -> None:
        self.aborted.append(error)


class Two(nn.Module):
    """Two layers, of which a forward pass may leave one out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.uses_both = zero_linear(), zero_linear(), True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x) if self.uses_both else self.first(x)


def parts(
    clipping: str, release: Release | None, module: nn.Module | None = None, **opacus: Any
) -> tuple[GradSampleModule, SumOptimizer]:
    """A model of zeros, and its optimizer."""
    model: Any = (GhostModule if clipping == "ghost" else GradSampleModule)(module or zero_linear())
    clipper: Any = GhostClipper(model) if clipping == "ghost" else ExampleClipper(exact=True)
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    settings = {"noise_multiplier": 1.0, "max_grad_norm": 0.5, "expected_batch_size": 20}
    return model, SumOptimizer(inner, clipper=clipper, release=release, **settings | opacus)


def backward(model: nn.Module, rows: slice = slice(None)) -> None:
    nn.functional.cross_entropy(model(X[rows]), Y[rows]).backward()


def flat(model: nn.Module) -> torch.Tensor:
    return dp_optimizer.flat(model.parameters())


def whole_sum(clipping: str) -> torch.Tensor:
    """The clipped sum of all records at a model of zeros."""
    model, optimizer = parts(clipping, release := Recorded())
    backward(model)
    optimizer.step()
    return release.sums[0]


@BOTH
def test_noise_is_as_wide_as_the_clipper_says_a_record_can_move_the_sum(clipping: str):
    model, optimizer = parts(clipping, release := Recorded(), noise_multiplier=3.0)
    backward(model)
    optimizer.step()
    assert release.deviations == [3.0 * 0.5 * (1 + CLIP_MARGIN)]


@BOTH
def test_a_step_is_the_mean_over_the_expected_batch(clipping: str):
    model, optimizer = parts(clipping, Recorded(), expected_batch_size=40)
    backward(model)
    optimizer.step()
    assert torch.allclose(-flat(model).double() * 40, whole_sum(clipping), atol=1e-5)


# -- what is charged before what ---------------------------------------------------------------


def own_noise(charge: Callable[[], None]) -> OwnNoise:
    return OwnNoise(SystemRandomness(), charge)


def over_sites(charge: Callable[[], None]) -> SumOverSites:
    return SumOverSites(lambda total: total, charge, lambda _: None)


RELEASES = pytest.mark.parametrize("release", [own_noise, over_sites])


@BOTH
@RELEASES
def test_nothing_is_made_of_a_step_before_its_charge(
    monkeypatch: pytest.MonkeyPatch, clipping: str, release: Any
):
    order: list[str] = []
    gaussian, to_vector = dp_optimizer.gaussian, dp_optimizer.flat

    def draw(*arguments: Any) -> Any:
        order.append("made")
        return gaussian(*arguments)

    def hand_over(tensors: Any) -> Any:
        order.append("made")
        return to_vector(tensors)

    monkeypatch.setattr(dp_optimizer, "gaussian", draw)
    monkeypatch.setattr(dp_optimizer, "flat", hand_over)
    model, optimizer = parts(
        clipping, release(lambda: order.append(f"charged {optimizer.examples_in_step}"))
    )
    backward(model)
    optimizer.step()
    assert order == ["charged 20", "made"]
    assert optimizer.examples_in_step == 0


@BOTH
@RELEASES
def test_a_charge_that_fails_leaves_neither_a_step_nor_a_sum(clipping: str, release: Any):
    def refuse() -> None:
        raise PrivflError("the budget is spent")

    model, optimizer = parts(clipping, release(refuse))
    before = flat(model)
    backward(model)
    with pytest.raises(PrivflError, match="spent"):
        optimizer.step()
    assert torch.equal(flat(model), before)
    assert optimizer.examples_in_step == 0
    assert not optimizer.has_unused_gradients()
    assert all(p.summed_grad is None for p in optimizer.params)


@BOTH
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_release_that_fails_after_its_charge_leaves_no_sum(
    monkeypatch: pytest.MonkeyPatch, clipping: str, error: type[BaseException]
):
    def fail(*_: Any) -> Any:
        raise error

    model, optimizer = parts(clipping, noise := own_noise(lambda: None))
    backward(model)
    with monkeypatch.context() as patched:
        patched.setattr(dp_optimizer, "gaussian", fail)
        with pytest.raises(error):
            optimizer.step()
    assert noise.draws == 0
    assert all(p.summed_grad is None for p in optimizer.params)
    assert optimizer.examples_in_step == 0


def test_draws_are_steps_that_got_noise_and_not_their_pieces():
    model, optimizer = parts("hooks", noise := own_noise(lambda: None))
    for more_to_come in (True, False, True, False):
        optimizer.signal_skip_step(more_to_come)
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
    assert noise.draws == 2
    assert optimizer.examples_seen == 80


# -- sums over sites ---------------------------------------------------------------------------


def test_whatever_fails_before_the_sum_is_told_to_the_sites_that_wait():
    aborted: list[BaseException] = []
    failing = False

    def charge() -> None:
        if failing:
            raise PrivflError("the budget is spent")

    model, optimizer = parts("hooks", SumOverSites(lambda total: total, charge, aborted.append))
    with pytest.raises(PrivflError, match="without gradients of 2 trained parameters"):
        optimizer.step()
    failing = True
    backward(model)
    with pytest.raises(PrivflError, match="spent"):
        optimizer.step()
    assert [str(error).split()[0] for error in aborted] == ["optimizer.step()", "the"]


@BOTH
def test_a_sum_over_sites_gets_no_noise_here(clipping: str):
    sums: list[NDArray[np.float64]] = []

    def add(total: NDArray[np.float64]) -> NDArray[np.float64]:
        sums.append(total)
        return total + 1.0

    model, optimizer = parts(clipping, SumOverSites(add, lambda: None, lambda _: None))
    backward(model)
    optimizer.step()
    assert sums[0].dtype == np.float64
    assert torch.equal(torch.from_numpy(sums[0]), whole_sum(clipping))
    assert torch.allclose(-flat(model).double() * 20, whole_sum(clipping) + 1.0, atol=1e-5)


@BOTH
def test_a_sum_that_another_process_releases(clipping: str):
    model, optimizer = parts(clipping, None)
    sums = []
    for more_to_come in (True, False):
        optimizer.signal_skip_step(more_to_come)
        backward(model, slice(0, 10) if more_to_come else slice(10, 20))
        sums.append(optimizer.collect())
        optimizer.zero_grad()
    assert sums[0] is None
    assert sums[1] is not None
    assert torch.allclose(torch.from_numpy(sums[1]), whole_sum(clipping), rtol=1e-4, atol=1e-6)
    optimizer.follow(np.arange(12.0))
    assert torch.equal(flat(model), -torch.arange(12.0))


def test_an_exact_sum_is_handed_over_only_where_another_process_releases_it():
    model, optimizer = parts("hooks", own_noise(lambda: None))
    backward(model)
    with pytest.raises(InternalError, match="released here"):
        optimizer.collect()
    model, optimizer = parts("hooks", None)
    backward(model)
    with pytest.raises(InternalError, match="another process releases"):
        optimizer.step()
    assert not flat(model).any()


# -- pieces, interruptions and Opacus' interface -------------------------------------------------


@BOTH
def test_a_batch_in_pieces_is_one_sum(clipping: str):
    model, optimizer = parts(clipping, release := Recorded())
    loader = DataLoader(records(20), batch_size=20)
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=7, optimizer=optimizer
    ) as pieces:
        for x, y in pieces:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    (total,) = release.sums
    assert torch.allclose(total, whole_sum(clipping), rtol=1e-4, atol=1e-6)


@BOTH
def test_a_piece_that_fails_leaves_the_sum_as_it_was(clipping: str):
    model, optimizer = parts(clipping, release := Recorded(), layers := Two())
    optimizer.signal_skip_step(True)
    backward(model)
    optimizer.step()
    before = [p.summed_grad.clone() for p in optimizer.params]
    optimizer.zero_grad()
    layers.uses_both = False
    backward(model)
    optimizer.signal_skip_step(True)
    with pytest.raises(PrivflError, match="without gradients of 2 trained parameters"):
        optimizer.step()
    assert len(release.aborted) == 1
    assert all(torch.equal(p.summed_grad, b) for p, b in zip(optimizer.params, before, strict=True))
    assert optimizer.examples_in_step == 20


@BOTH
def test_a_layer_that_was_frozen_in_between_brings_nothing_back(clipping: str):
    model, optimizer = parts(clipping, release := Recorded(), layers := Two())
    backward(model)
    optimizer.signal_skip_step(True)
    optimizer.step()
    layers.second.requires_grad_(False)
    optimizer.forget_unfinished_step()
    layers.second.requires_grad_(True)
    backward(model)
    optimizer.step()
    assert float(release.sums[0].norm()) <= 20 * 0.5 * (1 + CLIP_MARGIN)
    model, optimizer = parts(clipping, alone := Recorded(), Two())
    backward(model)
    optimizer.step()
    assert torch.equal(release.sums[0], alone.sums[0])


def test_a_piece_that_was_announced_and_never_came_does_not_hold_up_the_next_step():
    model, optimizer = parts("hooks", release := Recorded())
    optimizer.signal_skip_step(True)
    optimizer.forget_unfinished_step()
    backward(model)
    optimizer.step()
    assert torch.equal(release.sums[0], whole_sum("hooks"))


def test_gradients_are_used_once():
    model, optimizer = parts("hooks", Recorded())
    backward(model)
    assert optimizer.has_unused_gradients()
    optimizer.step()
    assert not optimizer.has_unused_gradients()
    with pytest.raises(ValueError, match=r"zero_grad"):
        optimizer.step()


@BOTH
def test_cleared_gradients_are_in_no_sum(clipping: str):
    model, optimizer = parts(clipping, release := Recorded())
    backward(model)
    optimizer.zero_grad()
    assert not optimizer.has_unused_gradients()
    backward(model)
    optimizer.step()
    assert torch.equal(release.sums[0], whole_sum(clipping))


def test_a_batch_in_several_backward_passes_is_one_mean():
    model, optimizer = parts("hooks", release := Recorded())
    model.allow_grad_accumulation()
    backward(model, slice(0, 10))
    backward(model, slice(10, 20))
    assert len(optimizer.grad_samples[0]) == 20
    optimizer.step()
    assert torch.allclose(release.sums[0], whole_sum("hooks"), rtol=1e-4, atol=1e-6)
    assert torch.allclose(-flat(model).double() * 20, release.sums[0], atol=1e-5)


@BOTH
def test_a_learning_rate_scheduler_and_a_saved_state(clipping: str):
    model, optimizer = parts(clipping, Recorded())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    norms = []
    for _ in range(3):
        before = flat(model)
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        scheduler.step()
        norms.append(float((flat(model) - before).norm()))
    assert norms[1] < 0.7 * norms[0]
    assert norms[2] < 0.7 * norms[1]
    other = parts(clipping, Recorded())[1]
    other.load_state_dict(optimizer.state_dict())
    assert math.isclose(other.param_groups[0]["lr"], 0.125)
