"""Ghost clipping against per-example gradients: the same sums, and no record that adds more than
the clipping norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from opacus import GradSampleModule
from opacus.layers import DPLSTM
from torch import nn

from privfl.dp.clipping import ExampleClipper
from privfl.dp.ghost import GhostClipper, GhostModule, Piece, clipped_sum
from privfl.dp.optimizer import SumOptimizer
from privfl.errors import PrivflError

WORDS = torch.tensor(
    [[1, 2, 2, 3], [0, 0, 0, 0], [4, 1, 4, 1], [2, 3, 4, 5], [5, 5, 1, 2], [3, 3, 3, 1]]
)
NUMBERS = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.embedding(x).mean(dim=1))


class Twice(nn.Module):
    """One layer, used two times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.layer(torch.tanh(self.layer(x))))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.each, self.out = (
            nn.Embedding(6, 4, padding_idx=0),
            nn.Linear(4, 4),
            nn.Linear(4, 3),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.each(self.embedding(x))).sum(dim=1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = DPLSTM(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(x.reshape(len(x), 4, 2))[0][:, -1])


class Own(nn.Module):
    """A layer that Opacus does not know: its per-example gradients come from functorch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.out = nn.Parameter(torch.ones(8)), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x * self.scale)


MODELS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "linear": (lambda: nn.Linear(8, 3), NUMBERS),
    "no bias, frozen": (
        lambda: nn.Sequential(nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 3, bias=False)),
        NUMBERS,
    ),
    "norms": (
        lambda: nn.Sequential(
            nn.Linear(8, 8), nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.Linear(8, 3)
        ),
        NUMBERS,
    ),
    "images": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 2, 4)), nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(6, 3)
        ),
        NUMBERS,
    ),
    "4-D linear": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (2, 2, 2)), nn.Linear(2, 3), nn.Flatten(), nn.Linear(12, 3)
        ),
        NUMBERS,
    ),
    "words": (Words, WORDS),
    "tied": (Tied, WORDS),
    "twice": (Twice, NUMBERS),
    "recurrent": (Recurrent, NUMBERS),
    "own": (Own, NUMBERS),
}


def collected(
    kind: str, model: nn.Module, x: torch.Tensor, clip: float, reduction: str = "mean"
) -> Any:
    wrapped = (GhostModule if kind == "ghost" else GradSampleModule)(
        model, loss_reduction=reduction
    )
    optimizer = SumOptimizer(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0),
        clipper=GhostClipper(wrapped) if kind == "ghost" else ExampleClipper(exact=True),
        release=None,
        noise_multiplier=0.0,
        max_grad_norm=clip,
        expected_batch_size=6,
    )
    target = torch.arange(len(x)) % 3
    nn.functional.cross_entropy(wrapped(x), target, reduction=reduction).backward()
    total = optimizer.collect()
    wrapped.remove_hooks()
    return torch.from_numpy(total), optimizer


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("clip", [1e-2, 0.7, 1e3])
@pytest.mark.parametrize("name", MODELS)
def test_the_sum_is_that_of_clipped_per_example_gradients(name: str, clip: float):
    torch.manual_seed(0)
    make, x = MODELS[name]
    model = make()
    want, _ = collected("hooks", model, x, clip)
    ghost_sum, optimizer = collected("ghost", model, x, clip)
    # A norm is overstated by up to 2^-15 of the sum of the norms of a sequence's terms.
    assert torch.allclose(ghost_sum, want, rtol=2e-4, atol=2e-4 * clip), (
        (ghost_sum - want).abs().max()
    )
    assert ghost_sum.abs().max() > 0
    assert optimizer.examples_seen == 6


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["ghost", "hooks"])
def test_a_batch_without_records_adds_nothing(kind: str, reduction: str):
    for name, (make, x) in MODELS.items():
        if (kind, name) == ("ghost", "recurrent"):
            continue  # Opacus' sampler of a DPLSTM does not take an empty batch
        total, optimizer = collected(kind, make(), x[:0], 1.0, reduction)
        assert not total.any()
        assert optimizer.examples_seen == 0


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e25])
@pytest.mark.parametrize("name", ["linear", "norms", "images", "4-D linear", "twice", "own"])
def test_a_record_that_is_not_finite_counts_as_zero_and_a_huge_one_is_clipped(
    name: str, value: float
):
    torch.manual_seed(0)
    model, x = MODELS[name][0](), NUMBERS.clone()
    without, _ = collected("ghost", model, x[1:], 0.5, "sum")
    x[0, 3] = value
    # The others' targets move with their places, so the record is put at the end.
    ghost_sum, optimizer = collected("ghost", model, torch.cat([x[1:], x[:1]]), 0.5, "sum")
    assert torch.isfinite(ghost_sum).all()
    assert (ghost_sum - without).norm() <= 0.5 * (1 + 2**-10)
    if value != 1e25:
        assert optimizer.examples_dropped == 1
        assert torch.allclose(ghost_sum, without, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6, 1e12])
def test_terms_of_a_sequence_that_nearly_cancel_keep_to_the_clipping_norm(scale: float):
    torch.manual_seed(0)
    for gap in (0.0, 1e-6, 1e-3):
        layer = nn.Linear(5, 3, bias=False)
        ghost = GhostModule(layer, loss_reduction="sum")
        x = torch.randn(1, 40, 5) * scale
        x[0, 1::2] = -x[0, ::2] * (1 + gap)
        nn.functional.cross_entropy(
            ghost(x).sum(dim=1), torch.zeros(1, dtype=torch.long), reduction="sum"
        ).backward()
        (total,) = clipped_sum(ghost.take(), [layer.weight], 1e-2).totals
        ghost.remove_hooks()
        assert float(total.norm()) <= 1e-2 * (1 + 2**-10)


@pytest.mark.parametrize("features", [1, 3])
def test_terms_whose_sum_is_below_the_rounding_of_their_squares_are_clipped(features: int):
    """1 + 2^-30 - 1: the square of the sum, 2^-60, is nothing beside the squares that it is
    computed from.
    """
    layer = nn.Linear(features, 3, bias=False)
    x = torch.tensor([1.0, 2.0**-30, -1.0]).view(1, 3, 1).expand(1, 3, features)
    (total,) = clipped_sum(
        [Piece(layer, [x], torch.full((1, 3, 3), 1e12))], [layer.weight], 1e-2
    ).totals
    assert 0 < float(total.norm()) <= 1e-2 * (1 + 2**-10)


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_a_weight_that_a_function_uses_too_adds_only_what_was_measured():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.layer(x), self.layer.weight)[:, :3]

    total, _ = collected("ghost", Functional(), 1e3 * NUMBERS[:1], 1.0, "sum")
    assert float(total.norm()) <= 1 + 2**-10


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_a_step_without_a_backward_pass_is_refused():
    _, optimizer = collected("ghost", nn.Linear(8, 3), NUMBERS, 1.0)
    with pytest.raises(PrivflError, match="call backward\\(\\) once before every step"):
        optimizer.collect()
