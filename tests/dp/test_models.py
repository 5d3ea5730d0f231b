"""Models, losses and data sets that would break the guarantee, or the run, are refused with one
sentence; others train.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from privfl.dp.checks import check_model
from privfl.dp.evaluation import measure
from privfl.errors import PrivflError
from tests.dp.helpers import local, records, train_once, zero_linear

# -- models, records and functions that do not fit -------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(5),
        nn.BatchNorm1d(5, affine=False),
        nn.SyncBatchNorm(5),
        nn.BatchNorm1d(5, affine=False, track_running_stats=False),
    ],
    ids=["plain", "affine=False", "sync", "without statistics"],
)
def test_batch_norm_is_refused(layer: nn.Module):
    with pytest.raises(
        PrivflError, match=r"layer '0' of model\(\) is a .*BatchNorm.*use GroupNorm or LayerNorm"
    ):
        check_model(nn.Sequential(layer, nn.Linear(5, 2)))


def test_frozen_batch_norm_is_refused_although_opacus_takes_it():
    from opacus.validators import ModuleValidator

    layer = nn.BatchNorm1d(5)
    for p in layer.parameters():
        p.requires_grad = False
    model = nn.Sequential(layer, nn.Linear(5, 2))
    assert ModuleValidator.validate(model) == [], "Opacus now refuses it by itself"
    with pytest.raises(PrivflError, match="BatchNorm"):
        check_model(model)


def test_running_statistics_are_refused_wherever_they_are():
    with pytest.raises(PrivflError, match="running statistics"):
        check_model(nn.Sequential(nn.InstanceNorm1d(5, track_running_stats=True), nn.Linear(5, 2)))

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.seen += x.detach().mean(dim=0)
            return x

    # Without a parameter of its own the layer passes every validator; the buffer gives it away.
    with pytest.raises(PrivflError, match=r"'0.seen' of model\(\) is not trained but changes"):
        train_once(local(nn.Sequential(Counts(), zero_linear())))


class Centred(nn.Module):
    """Keeps the mean of the first batch it sees, in a frozen parameter or a buffer, whichever
    mode it is in.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "parameter":
            self.center = nn.Parameter(torch.zeros(5), requires_grad=False)
        else:
            self.register_buffer("center", torch.zeros(5), persistent=kind == "buffer")
        self.linear = zero_linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.center.any():
            self.center.data.copy_(x.mean(dim=0))
        return self.linear(x - self.center)


@pytest.mark.parametrize("kind", ["parameter", "buffer", "hidden buffer"])
def test_statistics_of_records_are_not_let_into_what_is_not_trained(kind: str):
    with pytest.raises(PrivflError, match="'center' of model"):
        local(Centred(kind))


def test_evaluation_records_are_not_let_into_a_buffer():
    class OnlyEvaluation(Centred):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) if self.training else super().forward(x)

    trainer = local(OnlyEvaluation("buffer"))
    with pytest.raises(PrivflError, match="'center' of model"):
        trainer.outputs(records(10))


def test_what_a_forward_pass_does_to_trained_weights_is_refused():
    class Centred(nn.Module):
        """Keeps the records' mean in a weight, past torch's counters."""

        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(6, 4), nn.Linear(12, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.words.weight.data[0] = x.float().mean()
            return self.out(self.words(x).flatten(1))

    model = Centred()
    tokens = TensorDataset(torch.randint(0, 6, (50, 3)), torch.randint(0, 2, (50,)))
    with pytest.raises(
        PrivflError, match=r"changes parameter 'words\.weight' without clipping or noise"
    ):
        local(model, tokens)


def test_parts_of_a_record_folded_into_the_batch_are_refused():
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = zero_linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.reshape(-1, 2)).reshape(len(x), -1, 2).mean(dim=1)

    with pytest.raises(PrivflError, match="saw 24 rows for 8 records"):
        local(Patches(), records(100, 6))


class MoreRows(Dataset):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.randn(5), index % 2

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        return [self[i] for i in indices for _ in range(3)]


def test_a_data_set_that_gives_more_rows_than_records_is_refused():
    with pytest.raises(PrivflError, match="24 inputs and 24 targets for 8 records"):
        local(train=MoreRows(), sampling_rate=0.5)


class Mixed(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout, self.linear = nn.Dropout(dropout), zero_linear()
        nn.init.normal_(self.linear.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.dropout((x - x.mean(dim=0)) / (x.std(dim=0, unbiased=False) + 0.1)))


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (
            zero_linear(),
            lambda o, t: nn.functional.cross_entropy(o, t, weight=torch.tensor([0.05, 5.0])),
        ),
        (zero_linear(5, 1), lambda o, t: nn.functional.mse_loss(o, t.float())),
        (Mixed(), nn.functional.cross_entropy),
        (Mixed(0.5), nn.functional.cross_entropy),
        (zero_linear(), lambda o, t: nn.functional.cross_entropy(o, t) * len(o)),
    ],
    ids=[
        "weighted mean",
        "broadcast",
        "batch statistics",
        "behind dropout",
        "a sum instead of a mean",
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_records_that_depend_on_their_neighbours_are_refused(model: nn.Module, loss: Any):
    with pytest.raises(PrivflError, match="depends on the other records of its batch"):
        local(model, loss=loss)


def test_class_weights_written_per_record_are_fine():
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        weights = torch.tensor([0.05, 5.0])[target]
        return (nn.functional.cross_entropy(output, target, reduction="none") * weights).mean()

    train_once(local(loss=loss))


def test_a_model_that_could_not_be_written_is_refused():
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

    with pytest.raises(PrivflError, match="'_extra_state' in the state_dict"):
        check_model(Extra(5, 2))


def test_models_that_work():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(6, 4)
            self.output = nn.Linear(4, 6, bias=False)
            self.output.weight = self.embedding.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.output(self.embedding(x).mean(dim=1))

    frozen = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    frozen[0].weight.requires_grad = False
    tokens = TensorDataset(torch.randint(0, 6, (50, 3)), torch.randint(0, 6, (50,)))
    for model, data in [
        (
            nn.Sequential(
                nn.Linear(5, 8), nn.GroupNorm(2, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2)
            ),
            records(),
        ),
        (frozen, records()),
        (Tied(), tokens),
    ]:
        trainer = local(model, data)
        start = trainer.flat()
        update = trainer.train_round(start)
        assert len(update) == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert np.isfinite(update).all()
        assert np.abs(update).max() > 0


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: local(train=records(0)), "no training records"),
        (
            lambda: local(train=records(30), sampling_rate=0.01),
            r"30 training records at sampling_rate 0.01 make 0.3 .*at least 0.033",
        ),
        (lambda: local(train=iter([])), "map-style"),
        (lambda: local(nn.Identity()), "no trainable parameter"),
        (lambda: local("model"), "must return a torch.nn.Module"),
        (lambda: local(nn.Linear(5, 2).double()), "not float32"),
        (lambda: local(nn.Sequential(nn.LSTM(5, 2))), "cannot be trained with DP-SGD"),
    ],
    ids=[
        "no records",
        "too few for q",
        "iterable",
        "nothing to train",
        "no module",
        "double",
        "LSTM",
    ],
)
def test_refused_before_a_record_is_touched(make: Any, sentence: str):
    with pytest.raises(PrivflError, match=sentence):
        make()


class Triples(Dataset):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        return index, index, index


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(5, 2), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: local(loss=lambda o, t: o.sum() * math.nan), "NaN or infinite for every record"),
        (
            lambda: local(optimizer_options={"lr": 3e38}, sampling_rate=0.01, local_steps=20),
            "NaN or infinite",
        ),
        (
            lambda: local(loss=lambda o, t: nn.functional.cross_entropy(o, t, reduction="none")),
            "single number",
        ),
        (lambda: local(Unused()), "'unused.weight' .* took no part"),
        (lambda: local(train=Triples(), sampling_rate=1.0), r"pair \(input, target\)"),
    ],
    ids=["NaN loss", "diverged", "unreduced loss", "unused layer", "triples"],
)
def test_stopped_before_or_while_training(make: Any, sentence: str):
    with pytest.raises(PrivflError, match=sentence):
        train_once(make())


def test_optimizer_state_starts_anew_each_round():
    """The update depends on the replica and this round only: with no noise, two rounds from one
    replica are equal.
    """
    trainer = local(
        noise_multiplier=1e-12, sampling_rate=1.0, optimizer="adam", optimizer_options={"lr": 0.1}
    )
    start = trainer.flat()
    assert np.allclose(trainer.train_round(start), trainer.train_round(start), atol=1e-6)


def test_any_map_style_data_set():
    class Rows(Dataset):
        def __len__(self) -> int:
            return 100

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.full((5,), float(index)), index % 2

    trainer = local(train=Rows())
    assert np.isfinite(trainer.train_round(trainer.flat())).all()


def test_metrics_are_checked():
    output, target = torch.zeros(4, 2), torch.zeros(4)
    assert measure(
        {"m": lambda o, t: (torch.tensor([1, 2]), torch.tensor([3, 4]))}, output, target
    ) == {"m": ([1.0, 2.0], [3.0, 4.0])}
    for bad in (
        lambda o, t: 1.0,
        lambda o, t: ([1], [1, 2]),
        lambda o, t: (math.nan, 1),
        lambda o, t: (1, -1),
        lambda o, t: ("x", 1),
    ):
        with pytest.raises(PrivflError, match=r"evaluation.metrics.m must return"):
            measure({"m": bad}, output, target)
