"""Metrics of private evaluation records: what one record can change is bounded, whatever the
metric returns.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from privfl.dp.evaluation import measure, measure_each
from privfl.dp.training import LocalTraining
from privfl.errors import PrivflError
from privfl.noise.randomness import SystemRandomness
from tests.dp.helpers import CPU, recipe, records, zero_linear

OUTPUT, TARGET = (
    torch.randn(40, 3, generator=torch.Generator().manual_seed(1)),
    torch.arange(40) % 3,
)


def accuracy(output: torch.Tensor, target: torch.Tensor) -> tuple[Any, Any]:
    return (output.argmax(dim=1) == target).sum(), len(target)


def by_class(output: torch.Tensor, target: torch.Tensor) -> tuple[Any, Any]:
    right = output.argmax(dim=1) == target
    return [(right & (target == c)).sum() for c in range(3)], [
        (target == c).sum() for c in range(3)
    ]


def auc(output: torch.Tensor, target: torch.Tensor) -> tuple[Any, Any]:
    one, other = output[target == 1, 0], output[target != 1, 0]
    return (one[:, None] > other[None]).sum(), len(one) * len(other)


def huge(output: torch.Tensor, target: torch.Tensor) -> tuple[Any, Any]:
    return (1e6 * output[:, 0]).sum(), 50 * len(target)


def test_bounded_metrics_are_what_they_were():
    """Counts of single records have length 1 already, so cutting changes nothing."""
    metrics = {"accuracy": accuracy, "by_class": by_class}
    for name, pair in measure(metrics, OUTPUT, TARGET).items():
        assert measure_each(metrics, OUTPUT, TARGET)[name] == (
            pytest.approx(pair[0]),
            pytest.approx(pair[1]),
        )


def _change(metric: Any, output: torch.Tensor, target: torch.Tensor, record: int) -> list[float]:
    """How far sums and counts move when one record is taken out."""
    others = [i for i in range(len(output)) if i != record]
    whole, less = (
        measure_each({"m": metric}, output, target)["m"],
        measure_each({"m": metric}, output[others], target[others])["m"],
    )
    return [float(np.linalg.norm(np.subtract(a, b))) for a, b in zip(whole, less, strict=True)]


@pytest.mark.parametrize("metric", [accuracy, by_class, huge])
@pytest.mark.parametrize("record", [0, 7, 39])
def test_one_record_changes_sums_and_counts_by_one_at_most(metric: Any, record: int):
    assert max(_change(metric, OUTPUT, TARGET, record)) <= 1.0 + 1e-12


def test_that_check_sees_a_metric_that_is_not_cut(monkeypatch: pytest.MonkeyPatch):
    from privfl.dp import evaluation

    monkeypatch.setattr(evaluation, "_cut", lambda rows: rows)
    assert max(_change(huge, OUTPUT, TARGET, 7)) > 1e4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_record_that_breaks_the_metric_counts_as_zero(bad: float):
    output = OUTPUT.clone()
    output[3] = bad
    sums, counts = measure_each({"m": lambda o, t: (o.sum(), len(t))}, output, TARGET)["m"]
    assert math.isfinite(sums[0])
    assert counts == [40.0]


def test_pairs_of_records_are_refused():
    with pytest.raises(
        PrivflError, match=r"evaluation.metrics.auc of several records is not the sum over them"
    ):
        measure_each({"auc": auc}, OUTPUT, TARGET)


@pytest.mark.parametrize("rare", [0.15, 0.02])
def test_a_mean_over_pairs_times_the_number_of_records_is_refused(rare: float):
    """AUC as everybody writes it: NaN for a group of one class, and for every record alone."""

    def scaled(output: torch.Tensor, target: torch.Tensor) -> tuple[Any, Any]:
        one, other = output[target == 1, 0], output[target != 1, 0]
        return (one[:, None] > other[None]).double().mean() * len(target), len(target)

    output = torch.randn(849, 1)
    target = (torch.arange(849) < 849 * rare).long()  # sorted by class
    with pytest.raises(PrivflError, match=r"evaluation.metrics.auc"):
        measure_each({"auc": scaled}, output, target)
    only = torch.zeros(849, dtype=torch.long)
    with pytest.raises(PrivflError, match=r"evaluation.metrics.auc is NaN or infinite for most"):
        measure_each({"auc": scaled}, output, only)


def test_outputs_and_targets_of_different_shapes_are_named():
    def right(output: torch.Tensor, target: torch.Tensor) -> tuple[Any, Any]:
        return ((output > 0) == target).sum(), len(target)

    target = torch.arange(40) % 2
    assert measure_each({"right": right}, OUTPUT[:, 0], target)["right"][1] == [40.0]
    with pytest.raises(PrivflError, match=r"shape \(records, 1\) .* use output.squeeze\(1\)"):
        measure_each({"right": right}, OUTPUT[:, :1], target)


def test_a_metric_that_some_records_do_not_have_is_taken():
    """Of a class that is rare, as sensitivity is."""

    def sensitivity(output: torch.Tensor, target: torch.Tensor) -> tuple[Any, Any]:
        return ((output[:, 0] > 0) & (target == 1)).sum(), (target == 1).sum()

    target = (torch.arange(200) < 10).long()
    sums, counts = measure_each({"m": sensitivity}, torch.ones(200, 1), target)["m"]
    assert (sums, counts) == ([10.0], [10.0])


def test_a_metric_that_returns_no_pair_is_refused():
    with pytest.raises(PrivflError, match=r"evaluation.metrics.m must return a pair"):
        measure_each({"m": lambda o, t: 1.0}, OUTPUT, TARGET)


class CoupledWhenUsed(nn.Module):
    """Looks at its batch only when it does not train, where the probe of gradients cannot see
    it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x if self.training else x - x.mean(dim=0))


def test_a_model_that_couples_records_only_when_it_is_used_is_refused():
    def trainer(model: nn.Module) -> LocalTraining:
        return LocalTraining(
            model, nn.functional.cross_entropy, records(), recipe(), SystemRandomness(), CPU
        )

    trainer(zero_linear()).check_outputs(records(30))
    with pytest.raises(PrivflError, match="depends on the other records of its batch"):
        trainer(CoupledWhenUsed()).check_outputs(records(30))


def test_one_record_cannot_stop_a_run():
    """Neither by cancelling a sum in single precision, nor by another number of ratios."""

    def error(output: torch.Tensor, target: torch.Tensor) -> tuple[Any, Any]:
        return (output[:, 0] - target).sum(), len(target)

    output = torch.tensor([[3e8], [1.3], [2.0], [-3e8], *([[0.5]] * 20)])
    assert measure_each({"m": error}, output, torch.zeros(24))["m"][1] == [24.0]

    def counted(output: torch.Tensor, target: torch.Tensor) -> tuple[Any, Any]:
        return (torch.bincount(target.long(), minlength=3).double(),) * 2

    labels = torch.zeros(50)
    labels[40] = 3  # a class that nobody else has
    assert measure_each({"m": counted}, torch.zeros(50, 1), labels)["m"][0] == [49.0, 0.0, 0.0]


class Augmented(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Gives two rows for each record, as augmentation at test time does."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((5,), float(index)), index % 2

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        return [self[i] for i in indices for _ in range(2)]


def test_evaluation_records_are_one_row_each():
    trainer = LocalTraining(
        zero_linear(), nn.functional.cross_entropy, records(), recipe(), SystemRandomness(), CPU
    )
    with pytest.raises(PrivflError, match="20 evaluation records gave"):
        trainer.outputs(Augmented())
