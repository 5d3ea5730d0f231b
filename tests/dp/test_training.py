"""DP-SGD at one site. Every trap has a test; where the defence can be taken out, the test shows that it then fails."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from scipy import stats
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from privfl.dp import training
from privfl.dp.checks import check_model
from privfl.dp.optimizer import SENSITIVITY_MARGIN, SystemNoiseOptimizer
from privfl.dp.randomness import SeededRandomness, SystemRandomness, gaussian, poisson_sample
from privfl.dp.training import LocalTraining, Recipe, measure
from privfl.errors import PrivflError

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
    model: nn.Module | None = None, train: Any = None, loss: Any = nn.functional.cross_entropy, **changes: Any
) -> LocalTraining:
    data = records() if train is None else train
    return LocalTraining(model or zero_linear(), loss, data, recipe(**changes), SystemRandomness(), CPU)


# -- where the randomness comes from --------------------------------------------------------------------------------------

# Two fresh processes that do what users do: seed torch's global generator, the same everywhere.
_NOISE = """
import sys, torch
from torch import nn
from tests.dp.test_training import local, zero_linear, records
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
torch.manual_seed(0)
if sys.argv[1] in ("our noise", "our samples"):
    # All records in every step: only the noise can differ. Hardly any noise: only the samples can.
    t = local(sampling_rate=1.0) if sys.argv[1] == "our noise" else local(noise_multiplier=1e-9)
    print(t.train_round(t.flat()).tobytes().hex())
else:
    model = GradSampleModule(zero_linear())
    generator = torch.Generator() if sys.argv[1] == "unseeded generator" else None
    opt = DPOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=10,
                      generator=generator)
    x, y = records().tensors
    nn.functional.cross_entropy(model(x), y).backward()
    opt.step()
    print(next(model.parameters()).detach().numpy().tobytes().hex())
"""


def _two_processes(which: str) -> list[str]:
    return [
        subprocess.run([sys.executable, "-c", _NOISE, which], capture_output=True, text=True, check=True).stdout for _ in range(2)
    ]


@pytest.mark.parametrize("what", ["our noise", "our samples"])
def test_two_processes_with_the_same_torch_seed_differ(what: str):
    first, second = (np.frombuffer(bytes.fromhex(out), dtype=np.float32) for out in _two_processes(what))
    # Not by rounding: by as much as the noise, or another sample, makes.
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("trap", ["unseeded generator", "global generator"])
def test_the_trap_is_real_without_our_optimizer(trap: str):
    first, second = _two_processes(trap)
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


# -- sampling -------------------------------------------------------------------------------------------------------------


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
    assert trainer.optimizer.noise_draws == 200
    # P(batch empty) = 0.95^20 = 0.36: if only batches with records were steps, about 128 would be counted.
    assert np.isfinite(update).all()


# -- clipping and noise ---------------------------------------------------------------------------------------------------


def test_noise_has_the_accounted_standard_deviation():
    sigma, clip, q, n = 1.7, 0.5, 0.2, 50
    trainer = local(
        zero_linear(200, 50),
        records(n, 200),
        lambda out, _: out.sum() * 0.0,
        noise_multiplier=sigma,
        max_grad_norm=clip,
        sampling_rate=q,
        local_steps=12,
    )
    update = trainer.train_round(trainer.flat())
    expected = sigma * clip * (1 + SENSITIVITY_MARGIN) / (q * n) * math.sqrt(12)
    z = (np.var(update) / expected**2 - 1) / math.sqrt(2 / len(update))
    assert abs(z) < 5
    assert trainer.optimizer.noise_draws == 12


class Weights(nn.Module):
    """A model whose per-example gradient is the input itself."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layer = nn.Linear(features, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def _sums(optimizer_class: Any, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """The clipped sum over the rows of x, whose gradients are the rows themselves."""
    model = GradSampleModule(Weights(x.shape[1]))
    optimizer = optimizer_class(
        torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1, **kwargs
    )
    model(x).sum().backward()
    optimizer.clip_and_accumulate()
    return next(model.parameters()).summed_grad.reshape(-1)


HOSTILE = [
    [math.inf, 0, 0],
    [math.nan, 1, 1],
    [1e25, 0, 0],
    [3e38, 3e38, 3e38],
    [-math.inf, math.inf, 0],
    [1e-30, 0, 0],
    [100, -100, 3],
]


@pytest.mark.parametrize("row", HOSTILE)
def test_no_example_contributes_more_than_the_clipping_norm(row: list[float]):
    total = _sums(SystemNoiseOptimizer, torch.tensor([row], dtype=torch.float32), randomness=SystemRandomness())
    assert torch.isfinite(total).all()
    assert total.norm().item() <= 1.0 + SENSITIVITY_MARGIN


def test_random_examples_never_exceed_the_margin():
    rows = torch.randn(300, 40) * 10 ** torch.empty(300, 1).uniform_(-3, 6)
    worst = max(_sums(SystemNoiseOptimizer, row[None], randomness=SystemRandomness()).norm().item() for row in rows)
    assert worst <= 1.0 + SENSITIVITY_MARGIN


@pytest.mark.parametrize("row", [torch.full((1, 10_000_000), 0.1), torch.randn(1, 10_000_000)], ids=["equal", "random"])
def test_norms_of_large_gradients_are_not_understated(row: torch.Tensor):
    """In float32 the norm of 10^7 equal entries comes out 8e-3 too small, and the clipped gradient as much too long."""
    ours = _sums(SystemNoiseOptimizer, row, randomness=SystemRandomness()).double().norm().item()
    assert ours <= 1.0 + 1e-5
    if row[0, 0] == row[0, 1]:
        assert _sums(DPOptimizer, row).double().norm().item() > 1.0 + SENSITIVITY_MARGIN, (
            "Opacus has become exact; ours may be superfluous"
        )


def test_a_broken_record_does_not_touch_the_others():
    good = torch.randn(10, 3)
    poisoned = torch.cat([good, torch.tensor([[math.inf, 0, 0]])])
    clean = _sums(SystemNoiseOptimizer, good, randomness=SystemRandomness())
    guarded = _sums(SystemNoiseOptimizer, poisoned, randomness=SystemRandomness())
    assert torch.allclose(clean, guarded)
    assert not torch.isfinite(_sums(DPOptimizer, poisoned)).all(), "Opacus now guards by itself; ours may be superfluous"


def test_one_infinite_record_does_not_stop_or_poison_a_run():
    x, y = records().tensors
    x[3] = math.inf
    trainer = local(train=TensorDataset(x, y), sampling_rate=1.0)
    assert np.isfinite(trainer.train_round(trainer.flat())).all()
    assert trainer.optimizer.examples_dropped == 5


def _interrupted_then_next_step(trainer: LocalTraining) -> float:
    """Norm of the noiseless sum of one step after a physical batch was left without its end."""
    optimizer = trainer.optimizer
    everything = trainer._batch(np.arange(trainer.records))
    nn.functional.cross_entropy(trainer._wrapped(everything[0]), everything[1]).backward()
    optimizer.signal_skip_step(do_skip=True)
    optimizer.step()
    optimizer.zero_grad()
    before = trainer.flat()
    trainer._step(np.arange(trainer.records))
    return float(np.linalg.norm(trainer.flat() - before))


def test_an_interrupted_batch_does_not_double_the_next_sum(monkeypatch: pytest.MonkeyPatch):
    def fresh() -> LocalTraining:
        return local(noise_multiplier=1e-9, sampling_rate=1.0)

    reference = fresh()
    before = reference.flat()
    reference._step(np.arange(reference.records))
    alone = float(np.linalg.norm(reference.flat() - before))
    assert _interrupted_then_next_step(fresh()) == pytest.approx(alone, rel=1e-3)
    sabotaged = fresh()
    monkeypatch.setattr(SystemNoiseOptimizer, "forget_unfinished_step", lambda self: None)
    assert _interrupted_then_next_step(sabotaged) > 1.5 * alone, "the trap is gone; the defence may be superfluous"


def test_a_second_step_hook_does_not_switch_counting_off():
    trainer = local()
    trainer.optimizer.attach_step_hook(lambda _: None)
    trainer.optimizer.attach_step_hook(lambda _: None)
    trainer.train_round(trainer.flat())
    trainer.train_round(trainer.flat())
    assert trainer.optimizer.noise_draws == 10


def test_large_batches_in_pieces_give_the_same_sum(monkeypatch: pytest.MonkeyPatch):
    whole = local(noise_multiplier=1e-9, sampling_rate=1.0)
    one = whole.train_round(whole.flat())
    monkeypatch.setattr(training, "_GRADIENT_BYTES", 4 * 12 * 7)
    pieces = local(noise_multiplier=1e-9, sampling_rate=1.0)
    assert pieces._piece == 7
    assert np.allclose(one, pieces.train_round(pieces.flat()), atol=1e-5)
    assert pieces.optimizer.noise_draws == 5


def test_it_is_opacus_own_sum():
    """Without noise, a round is what Opacus' optimizer does with the same batches."""
    ours = local(noise_multiplier=1e-12, sampling_rate=1.0, local_steps=3)
    update = ours.train_round(ours.flat())
    model = GradSampleModule(zero_linear())
    theirs = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=100
    )
    x, y = records().tensors
    for _ in range(3):
        nn.functional.cross_entropy(model(x), y).backward()
        theirs.step()
        theirs.zero_grad()
    assert np.allclose(update, torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy(), atol=1e-6)


# -- models, records and functions that do not fit -------------------------------------------------------------------------


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
    with pytest.raises(PrivflError, match=r"layer '0' of model\(\) is a .*BatchNorm.*use GroupNorm or LayerNorm"):
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


def test_running_statistics_are_refused_wherever_they_hide():
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
        _train_once(local(nn.Sequential(Counts(), zero_linear())))


class Centred(nn.Module):
    """Keeps the mean of the first batch it sees, in a frozen parameter or a buffer, whichever mode it is in."""

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
def test_statistics_of_records_cannot_hide_in_what_is_not_trained(kind: str):
    with pytest.raises(PrivflError, match="'center' of model"):
        local(Centred(kind))


def test_held_out_records_cannot_hide_in_a_buffer():
    class OnlyEvaluation(Centred):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) if self.training else super().forward(x)

    trainer = local(OnlyEvaluation("buffer"))
    with pytest.raises(PrivflError, match="'center' of model"):
        trainer.outputs(records(10))


def test_what_a_forward_pass_does_to_trained_weights_is_refused():
    model = nn.Sequential(nn.Embedding(6, 4, max_norm=0.1), nn.Flatten(), nn.Linear(12, 2))
    tokens = TensorDataset(torch.randint(0, 6, (50, 3)), torch.randint(0, 2, (50,)))
    with pytest.raises(PrivflError, match=r"changes parameter '0\.weight' without clipping or noise"):
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
        (zero_linear(), lambda o, t: nn.functional.cross_entropy(o, t, weight=torch.tensor([0.05, 5.0]))),
        (zero_linear(5, 1), lambda o, t: nn.functional.mse_loss(o, t.float())),
        (Mixed(), nn.functional.cross_entropy),
        (Mixed(0.5), nn.functional.cross_entropy),
        (zero_linear(), lambda o, t: nn.functional.cross_entropy(o, t) * len(o)),
    ],
    ids=["weighted mean", "broadcast", "batch statistics", "behind dropout", "a sum instead of a mean"],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_records_that_lean_on_their_neighbours_are_refused(model: nn.Module, loss: Any):
    with pytest.raises(PrivflError, match="depends on the other records of its batch"):
        local(model, loss=loss)


def test_class_weights_written_per_record_are_fine():
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        weights = torch.tensor([0.05, 5.0])[target]
        return (nn.functional.cross_entropy(output, target, reduction="none") * weights).mean()

    _train_once(local(loss=loss))


def test_few_broken_records_never_stop_a_round():
    """A round may see a single record; if that one is broken, stopping would tell everybody about it."""
    x, y = records().tensors
    x[3] = math.inf
    trainer = local(train=TensorDataset(x, y), sampling_rate=0.01, local_steps=1)
    for _ in range(300):
        _train_once(trainer)


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
        (nn.Sequential(nn.Linear(5, 8), nn.GroupNorm(2, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2)), records()),
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
    ids=["no records", "too few for q", "iterable", "nothing to train", "no module", "double", "LSTM"],
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
        (lambda: local(optimizer_options={"lr": 3e38}, sampling_rate=0.01, local_steps=20), "NaN or infinite"),
        (lambda: local(loss=lambda o, t: nn.functional.cross_entropy(o, t, reduction="none")), "single number"),
        (lambda: local(Unused()), "'unused.weight' .* took no part"),
        (lambda: local(train=Triples(), sampling_rate=1.0), r"pair \(input, target\)"),
    ],
    ids=["NaN loss", "diverged", "unreduced loss", "unused layer", "triples"],
)
def test_stopped_before_or_while_training(make: Any, sentence: str):
    with pytest.raises(PrivflError, match=sentence):
        _train_once(make())


def _train_once(trainer: LocalTraining) -> None:
    trainer.train_round(trainer.flat())


def test_optimizer_state_starts_anew_each_round():
    """The update depends on the replica and this round only: with no noise, two rounds from one replica are equal."""
    trainer = local(noise_multiplier=1e-12, sampling_rate=1.0, optimizer="adam", optimizer_options={"lr": 0.1})
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
    assert measure({"m": lambda o, t: (torch.tensor([1, 2]), torch.tensor([3, 4]))}, output, target) == {
        "m": ([1.0, 2.0], [3.0, 4.0])
    }
    for bad in (
        lambda o, t: 1.0,
        lambda o, t: ([1], [1, 2]),
        lambda o, t: (math.nan, 1),
        lambda o, t: (1, -1),
        lambda o, t: ("x", 1),
    ):
        with pytest.raises(PrivflError, match=r"evaluation.metrics.m must return"):
            measure({"m": bad}, output, target)
