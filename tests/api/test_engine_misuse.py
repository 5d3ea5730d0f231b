"""What a loop of a user's own may do wrong: it is stopped, with one sentence, before more than
what is charged could leave.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

import privfl
from privfl.dp import optimizer as dp_optimizer
from privfl.errors import PrivflError
from privfl.ledger import Ledger
from privfl.transport import connect
from tests.api.test_engine import flat, linear, made, records, step
from tests.conftest import in_threads

NO_BATCH = "is no batch of the loader that make_private returned"
MODES = pytest.mark.parametrize("mode", ["hooks", "ghost", "functorch"])


def engine() -> privfl.PrivacyEngine:
    return privfl.PrivacyEngine(site="a")


def refused(sentence: str) -> Any:
    return pytest.raises(PrivflError, match=sentence)


# -- steps and batches -----------------------------------------------------------------------------


@MODES
def test_a_batch_is_one_step(mode: str):
    model, optimizer, *_, loader = made(engine(), records(), grad_sample_mode=mode)
    x, y = next(iter(loader))
    step(model, optimizer, x, y)
    before = flat(model)
    with refused(NO_BATCH):
        step(model, optimizer, x, y)
    assert torch.equal(flat(model), before)


def test_batches_of_an_earlier_pass_are_used_up():
    model, optimizer, loader = made(engine(), records())

    def loop() -> None:
        for x, y in itertools.islice(itertools.cycle(loader), 10):
            step(model, optimizer, x, y)

    with refused(NO_BATCH):
        loop()


@MODES
def test_a_loader_of_the_users_own(mode: str):
    model, optimizer, *_ = made(engine(), records(), grad_sample_mode=mode)
    x, y = next(iter(DataLoader(records(), batch_size=20)))
    with refused(NO_BATCH):
        step(model, optimizer, x, y)


def test_a_sampling_rate_that_is_changed_afterwards_changes_nothing():
    _, _, loader = made(engine(), records(count=1000), batch=50)
    loader.batch_sampler.sample_rate, loader.batch_sampler.num_samples = 1.0, 10**6
    assert all(len(batch) < 150 for batch in loader.batch_sampler)


@MODES
def test_a_record_with_several_rows(mode: str):
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.reshape(-1, 1)).reshape(len(x), 5, 2).mean(dim=1)

    model, optimizer, *_, loader = made(
        engine(), records(), model=Folded(), batch=60, grad_sample_mode=mode
    )
    with refused(NO_BATCH):
        step(model, optimizer, *next(iter(loader)))


def test_gradients_of_several_batches_do_not_become_one_step():
    model, optimizer, loader = made(engine(), records(), batch=60)
    model.allow_grad_accumulation()
    optimizer.zero_grad()
    batches = []
    for _ in range(3):
        x, y = next(iter(loader))
        nn.functional.cross_entropy(model(x), y).backward()
        batches.append((x, y))
    nn.functional.cross_entropy(model(x), y).backward()
    with refused(NO_BATCH):
        optimizer.step()


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_piece_that_is_left_out_takes_its_batch_with_it(
    monkeypatch: pytest.MonkeyPatch, mode: str
):
    """As after a failure of one piece: the pieces of two batches must not become one step."""
    monkeypatch.setattr(dp_optimizer, "gaussian", lambda count, *_: np.zeros(count))
    model, optimizer, *_, loader = made(
        engine(), records(), batch=60, max_grad_norm=1e-3, grad_sample_mode=mode
    )
    sums = []
    monkeypatch.setattr(
        type(optimizer), "scale_grad", lambda self: sums.append(self.params[0].grad.clone())
    )
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=25, optimizer=optimizer
    ) as pieces:
        for passes in range(2):
            for number, (x, y) in enumerate(pieces):
                if (passes, number) == (0, 2):
                    continue
                step(model, optimizer, x, y)
    # 60 records of at most 1e-3 each, in one whole batch and no more.
    assert len(sums) == 1
    assert float(sums[0].norm()) <= 60 * 1e-3


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_clipping_norm_that_changes_in_the_middle_of_a_batch(mode: str):
    model, optimizer, *_, loader = made(engine(), records(), batch=60, grad_sample_mode=mode)

    def loop() -> None:
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=25, optimizer=optimizer
        ) as pieces:
            for x, y in pieces:
                step(model, optimizer, x, y)
                optimizer.max_grad_norm = 1e-2

    with refused("max_grad_norm was changed between the pieces of one step"):
        loop()


def test_noise_that_is_taken_away_during_the_loop_ends_it(tmp_path: Path):
    own = privfl.PrivacyEngine(site="a", ledger=tmp_path / "l", budget=(1.0, 1e-5))
    model, optimizer, loader = made(own, records(), noise_multiplier=5.0)
    optimizer.noise_multiplier = 1e-155
    before = flat(model).clone()
    with refused("noise_multiplier must be between"):
        for x, y in loader:
            step(model, optimizer, x, y)
    assert torch.equal(flat(model), before)


def test_numbers_of_numpy_are_numbers(tmp_path: Path):
    def part(transport: Any) -> int:
        own = privfl.PrivacyEngine(
            site=f"s{transport.rank}", comm=transport, ledger=tmp_path / f"{transport.rank}.l"
        )
        noise = np.float32(1.5) if transport.rank == 1 else 1.5
        model, optimizer, loader = made(
            own, records(transport.rank), noise_multiplier=noise, max_grad_norm=np.float64(1.0)
        )
        step(model, optimizer, *next(iter(loader)))
        return len(own.accountant)

    assert in_threads(connect(3), part) == [1, 1, 1]


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_charge_that_is_refused_leaves_nothing_to_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
):
    monkeypatch.setattr(dp_optimizer, "gaussian", lambda count, *_: np.zeros(count))
    own = privfl.PrivacyEngine(site="a", ledger=tmp_path / "l", budget=(2.0, 1e-5))
    model, optimizer, *_, loader = made(
        own, records(), batch=60, max_grad_norm=1e-3, grad_sample_mode=mode, noise_multiplier=10.0
    )
    optimizer.noise_multiplier = 0.3
    sums = []
    monkeypatch.setattr(
        type(optimizer), "scale_grad", lambda self: sums.append(self.params[0].grad.clone())
    )

    def one_pass() -> None:
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=25, optimizer=optimizer
        ) as pieces:
            for x, y in pieces:
                step(model, optimizer, x, y)

    with refused("does not admit"):
        one_pass()
    assert sums == []
    # At once, and not only when the next batch is drawn: loaders with workers draw ahead.
    assert all(p.summed_grad is None for p in optimizer.params)
    optimizer.noise_multiplier = 10.0
    one_pass()
    assert float(sums[0].norm()) <= 60 * 1e-3


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_forward_pass_without_a_backward_pass_is_forgotten(mode: str):
    model, optimizer, *_, loader = made(engine(), records(), grad_sample_mode=mode)
    model(records().tensors[0])
    for x, y in loader:
        step(model, optimizer, x, y)
    assert torch.isfinite(flat(model)).all()


def test_an_optimizer_is_not_copied():
    model, optimizer, loader = made(engine(), records())
    with refused("an optimizer cannot be copied"):
        copy.deepcopy(optimizer)
    for x, y in loader:
        step(model, optimizer, x, y)


# -- models and loaders ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler", [SubsetRandomSampler(range(10)), WeightedRandomSampler([1.0] * 60, 60)]
)
def test_a_sampler_that_chooses_records(sampler: Any):
    model = linear()
    with refused(
        f"data_loader has a {type(sampler).__name__}, whose choice of records Poisson sampling "
        "would replace"
    ):
        engine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(records(), batch_size=20, sampler=sampler),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x - x.mean(dim=0))


class Statistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 2)
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean.copy_(x.detach().mean(dim=0))
        return self.layer(x)


def test_a_model_that_mixes_records():
    with refused("output for a record depends on the other records of its batch"):
        made(engine(), records(), model=Centred())


def test_a_buffer_that_keeps_statistics():
    model, optimizer, loader = made(engine(), records(), model=Statistics())
    with refused("'mean' of model\\(\\) is not trained but changes"):
        step(model, optimizer, *next(iter(loader)))


def test_weights_that_a_forward_pass_changes():
    words = TensorDataset(torch.randint(0, 6, (60, 3)), torch.zeros(60, dtype=torch.long))
    with refused("leave max_norm out"):
        made(
            engine(),
            words,
            model=nn.Sequential(nn.Embedding(6, 4, max_norm=0.1), nn.Flatten(), nn.Linear(12, 2)),
        )


def test_compatible_is_what_make_private_takes():
    def parts(module: nn.Module) -> dict[str, Any]:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        return {
            "module": module,
            "optimizer": optimizer,
            "data_loader": DataLoader(records(), batch_size=20),
        }

    assert engine().is_compatible(**parts(linear()))
    mixed = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))
    assert not engine().is_compatible(**parts(mixed))
    with refused("use GroupNorm or LayerNorm"):
        engine().validate(**parts(mixed))


# -- ledgers ---------------------------------------------------------------------------------------


def test_an_engine_serves_one_run():
    used = engine()
    made(used, records())
    with refused("an engine serves one training run"):
        made(used, records())


@pytest.mark.parametrize("begun", [None, (3.0, 1e-5)])
def test_a_ledger_keeps_the_budget_it_was_begun_with(
    tmp_path: Path, begun: tuple[float, float] | None
):
    first = privfl.PrivacyEngine(site="a", ledger=tmp_path / "l", budget=begun)
    made(first, records())
    first.close()
    other = privfl.PrivacyEngine(site="a", ledger=tmp_path / "l", budget=(1.0, 1e-5))
    with refused("was begun with .*, not with \\(1.0, 1e-05\\): a budget cannot be changed"):
        made(other, records())
    again = privfl.PrivacyEngine(site="a", ledger=tmp_path / "l", budget=begun)
    made(again, records())


# -- budgets of a ledger that exists ---------------------------------------------------------------


def planned(
    own: privfl.PrivacyEngine, epsilon: float = 2.0, delta: float = 1e-5, epochs: int = 3
) -> Any:
    model = linear()
    return own.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(records(), batch_size=6),
        target_epsilon=epsilon,
        target_delta=delta,
        epochs=epochs,
        max_grad_norm=1.0,
    )


def test_a_target_keeps_to_what_is_left_of_the_budget(tmp_path: Path):
    """All passes that were asked for can be made, in two runs on one ledger."""
    for epsilon in (1.2, 2.0):
        own = privfl.PrivacyEngine(site="a", ledger=tmp_path / "l", budget=(2.0, 1e-5))
        model, optimizer, loader = planned(own, epsilon)
        for x, y in itertools.chain.from_iterable(itertools.repeat(loader, 3)):
            step(model, optimizer, x, y)
        assert own.get_epsilon(1e-5) <= epsilon
        own.close()
    with Ledger.read(tmp_path / "l") as ledger:
        assert sum(ledger.steps("training").values()) == 60
        assert 1.9 < ledger.filters["training"].epsilon_of(ledger.spent("training")) <= 2.0


def test_a_target_at_a_larger_delta_than_the_budget_is_refused(tmp_path: Path):
    with refused("target_delta 1e-05 is above the 1e-06 of the ledger's budget"):
        planned(privfl.PrivacyEngine(site="a", ledger=tmp_path / "l", budget=(2.0, 1e-6)))


@pytest.mark.parametrize("budget", [2.0, (2.0,)])
def test_a_budget_is_a_pair(tmp_path: Path, budget: Any):
    with refused("budget must be \\(epsilon, delta\\)"):
        privfl.PrivacyEngine(site="a", ledger=tmp_path / "l", budget=budget)


def test_a_ledger_that_this_process_has_open_says_so(tmp_path: Path):
    first = privfl.PrivacyEngine(site="a", ledger=tmp_path / "l")
    made(first, records())
    with refused("in use in this process itself: close\\(\\) the object that has it open"):
        made(privfl.PrivacyEngine(site="a", ledger=tmp_path / "l"), records())
    first.close()
    made(privfl.PrivacyEngine(site="a", ledger=tmp_path / "l"), records())


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_gradients_are_not_accumulated_over_batches(mode: str):
    model, optimizer, *_, loader = made(engine(), records(), grad_sample_mode=mode)

    def loop() -> None:
        for number, (x, y) in enumerate(loader):
            nn.functional.cross_entropy(model(x), y).backward()
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()

    with refused("not compatible with gradient accumulation"):
        loop()
    # What the refused pass left behind is in no step of the next one.
    with pytest.warns(UserWarning, match="gradients of a batch .* were dropped"):
        x, y = next(iter(loader))
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert optimizer.examples_seen >= len(x)
