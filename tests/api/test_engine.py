"""`privfl.PrivacyEngine`: a user's own loop, alone with a ledger, and as secure sums over a
communicator.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import opacus
import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import privfl
from privfl._group_sum import GroupSum
from privfl.accounting import DiscreteGaussian, PoissonGaussian, epsilon_of
from privfl.dp import optimizer as dp_optimizer
from privfl.errors import BudgetError, PrivflError
from privfl.ledger import Ledger
from privfl.noise.discrete_gaussian import DiscreteGaussian as Sampler
from privfl.transport import connect
from tests.conftest import ROOT, in_threads, run_job


def records(site: int = 0, count: int = 60) -> TensorDataset:
    x = torch.randn(count, 5, generator=torch.Generator().manual_seed(site))
    return TensorDataset(x, (x.sum(dim=1) > 0).long())


def linear() -> nn.Module:
    layer = nn.Linear(5, 2)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    return layer


def made(
    engine: privfl.PrivacyEngine,
    data: TensorDataset,
    model: nn.Module | None = None,
    batch: int = 20,
    **changes: Any,
) -> Any:
    model = model or linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    arguments: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 1.0} | changes
    return engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(data, batch_size=batch),
        **arguments,
    )


def train(
    engine: privfl.PrivacyEngine, data: TensorDataset, passes: int = 2, **changes: Any
) -> Any:
    parts = made(engine, data, **changes)
    model, optimizer, loader = parts[0], parts[1], parts[-1]
    criterion = parts[2] if len(parts) == 4 else nn.functional.cross_entropy
    for _ in range(passes):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    return model


def step(model: nn.Module, optimizer: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def together(part: Callable[[Any], Any], ranks: int = 3) -> list[Any]:
    results = in_threads(connect(ranks), part)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


# -- alone -----------------------------------------------------------------------------------------


def test_every_step_is_in_the_ledger_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, seen = tmp_path / "zurich.ledger", []
    engine = privfl.PrivacyEngine(site="zurich", ledger=path)
    gaussian = dp_optimizer.gaussian

    def look(*arguments: Any) -> Any:
        with Ledger.read(path) as on_disk:
            seen.append(sum(row.steps for row in on_disk.charges()))
        return gaussian(*arguments)

    monkeypatch.setattr(dp_optimizer, "gaussian", look)
    train(engine, records())
    assert seen == [1, 2, 3, 4, 5, 6]
    engine.close()
    with Ledger.read(path) as ledger:
        event = PoissonGaussian(sampling_rate=20 / 60, noise_multiplier=1.0)
        assert list(ledger.events.values()) == [event]
        assert sum(ledger.steps("training").values()) == 6
    assert engine.get_epsilon(1e-5) == epsilon_of([event.times(6)], 1e-5).upper


def test_a_new_engine_goes_on_with_the_ledger(tmp_path: Path):
    for _ in range(2):
        engine = privfl.PrivacyEngine(site="zurich", ledger=tmp_path / "l")
        train(engine, records())
        engine.close()
    with Ledger.read(tmp_path / "l") as ledger:
        assert sum(ledger.steps("training").values()) == 12
        assert sum(row.kind == "run" for row in ledger.rows) == 2


def test_a_budget_ends_the_loop_and_the_step_is_not_made(tmp_path: Path):
    engine = privfl.PrivacyEngine(site="zurich", ledger=tmp_path / "l", budget=(8.0, 1e-5))
    model, optimizer, loader = made(engine, records())
    models = []

    def loop() -> None:
        while len(models) < 1000:
            for x, y in loader:
                models.append(flat(model))
                step(model, optimizer, x, y)

    with pytest.raises(BudgetError, match="does not admit 1 more step;"):
        loop()
    assert 1 < len(models) < 1000
    assert torch.equal(flat(model), models[-1])
    engine.close()
    with pytest.raises(PrivflError, match="this engine was closed"):
        step(model, optimizer, *next(iter(loader)))
    assert torch.equal(flat(model), models[-1])


def test_the_rate_is_batch_over_records_and_batches_are_poisson():
    _, optimizer, loader = made(privfl.PrivacyEngine(site="a"), records(count=1000), batch=64)
    assert loader.batch_sampler.sample_rate == 0.064
    assert optimizer.expected_batch_size == 64
    assert len(loader) == 16
    sizes = [len(batch) for _ in range(30) for batch in loader.batch_sampler]
    z = (np.mean(sizes) - 64) / np.sqrt(64 * 0.936 / len(sizes))
    assert abs(z) < 5
    assert 0.6 < np.var(sizes) / (64 * 0.936) < 1.6


def test_a_loop_that_was_left_early_leaves_nothing_to_the_next_step():
    engine = privfl.PrivacyEngine(site="a")
    model, optimizer, loader = made(engine, records(), batch=60)
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=20, optimizer=optimizer
    ) as pieces:
        for x, y in pieces:
            step(model, optimizer, x, y)
            break
        assert optimizer.params[0].summed_grad is not None
        iterator = iter(pieces)
        next(iterator)
    assert optimizer.params[0].summed_grad is None
    assert len(engine.accountant) == 0


def test_a_batch_in_pieces_is_one_step():
    engine = privfl.PrivacyEngine(site="a")
    model, optimizer, loader = made(engine, records(), batch=60)
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=20, optimizer=optimizer
    ) as pieces:
        for x, y in pieces:
            step(model, optimizer, x, y)
    assert len(engine.accountant) == 1
    assert not torch.equal(flat(model), flat(linear()))


def test_an_empty_batch_that_comes_first_is_a_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("privfl.dp.sampling.poisson_sample", lambda *_: np.empty(0, dtype=np.int64))
    for mode in ("hooks", "ghost"):
        engine = privfl.PrivacyEngine(site="a")
        model = train(engine, records(), grad_sample_mode=mode)
        assert len(engine.accountant) == 6
        assert torch.isfinite(flat(model)).all()
        assert not torch.equal(flat(model), flat(linear()))


def test_epsilon_is_reached_and_not_passed():
    engine = privfl.PrivacyEngine(site="a")
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(records(), batch_size=20),
        target_epsilon=2.0,
        target_delta=1e-4,
        epochs=3,
        max_grad_norm=1.0,
    )
    for _ in range(3):
        for x, y in loader:
            step(model, optimizer, x, y)
    assert 1.99 < engine.get_epsilon(1e-4) <= 2.0


def test_what_was_saved_is_counted_on_top(tmp_path: Path):
    engine = privfl.PrivacyEngine(site="a")
    model, optimizer, loader = made(engine, records())
    for x, y in loader:
        step(model, optimizer, x, y)
    engine.save_checkpoint(path=tmp_path / "c", module=model, optimizer=optimizer)
    other = privfl.PrivacyEngine(site="a")
    model, optimizer, loader = made(other, records())
    other.load_checkpoint(path=tmp_path / "c", module=model, optimizer=optimizer)
    assert other.get_epsilon(1e-5) == engine.get_epsilon(1e-5)
    for x, y in loader:
        step(model, optimizer, x, y)
    assert len(other.accountant) == 6
    other.load_checkpoint(path=tmp_path / "c", module=model, optimizer=optimizer)
    assert len(other.accountant) == 9


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"poisson_sampling": False}, "does not take poisson_sampling=False"),
        ({"noise_generator": torch.Generator()}, "does not take noise_generator"),
        ({"rand_on_empty": True}, "does not take rand_on_empty=True"),
        ({"clipping": "per_layer"}, "does not take clipping='per_layer'"),
        ({"grad_sample_mode": "ew"}, "choose one of hooks, functorch, ghost"),
        ({"max_grad_norm": [1.0, 1.0]}, "max_grad_norm must be one positive number"),
        ({"noise_multiplier": 0.0}, "noise_multiplier must be between 0.01 and 16384"),
        ({"noise_multiplier": 1e-160}, "noise_multiplier must be between 0.01 and 16384"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier must be between 0.01 and 16384"),
        (
            {
                "model": nn.Sequential(
                    nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2)
                )
            },
            "use GroupNorm or LayerNorm",
        ),
    ],
)
def test_what_would_break_the_guarantee_is_refused(changes: dict[str, Any], sentence: str):
    with pytest.raises(PrivflError, match=sentence):
        made(privfl.PrivacyEngine(site="a"), records(), **changes)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.embedding(x.abs().long().clamp(max=4)).mean(dim=1))


def _frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


MODELS = {
    "tied": Tied,
    "groupnorm": lambda: nn.Sequential(nn.Linear(5, 4), nn.GroupNorm(2, 4), nn.Linear(4, 2)),
    "frozen": _frozen,
}


@pytest.mark.parametrize("name", MODELS)
def test_models_train(name: str):
    model = MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train(privfl.PrivacyEngine(site="a"), records(), model=model)
    changed = {
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    trainable = {
        key for key, p in model.named_parameters(remove_duplicate=False) if p.requires_grad
    }
    assert changed == trainable


# -- together --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_without_noise_it_is_one_process_with_all_records(
    monkeypatch: pytest.MonkeyPatch, mode: str
):
    monkeypatch.setattr(Sampler, "draw", lambda self, count: np.zeros(count, dtype=np.int64))
    models = together(
        lambda t: train(
            privfl.PrivacyEngine(site=f"s{t.rank}", comm=t),
            records(t.rank),
            batch=60,
            grad_sample_mode=mode,
            passes=20,
        )
    )
    assert all(torch.equal(flat(models[0]), flat(other)) for other in models[1:])
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    x, y = (torch.cat([records(rank).tensors[part] for rank in range(3)]) for part in (0, 1))
    for _ in range(20):
        grads = []
        for row, target in zip(x, y, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(row[None]), target[None]).backward()
            g = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).double()
            grads.append(g * min(1.0, 1.0 / float(g.norm())))
        mean = torch.stack(grads).sum(dim=0) / 180
        start = 0
        for p in model.parameters():
            p.grad = mean[start : start + p.numel()].view_as(p).float()
            start += p.numel()
        optimizer.step()
    assert torch.allclose(flat(models[0]), flat(model), atol=2e-5)


def test_every_rank_charges_every_step_and_all_have_one_model(tmp_path: Path):
    def part(transport: Any) -> Any:
        engine = privfl.PrivacyEngine(
            site=f"s{transport.rank}", comm=transport, ledger=tmp_path / f"{transport.rank}.ledger"
        )
        # Of sites with unlike numbers of records the one with most steps in a pass decides for all.
        model = train(engine, records(transport.rank, 40 + 20 * transport.rank))
        engine.close()
        return model, engine.get_epsilon(1e-5)

    sites = together(part)
    assert all(torch.equal(flat(sites[0][0]), flat(model)) for model, _ in sites)
    for rank in range(3):
        with Ledger.read(tmp_path / f"{rank}.ledger") as ledger:
            (event,) = ledger.events.values()
            assert isinstance(event, DiscreteGaussian)
            assert event.sampling_rate == 20 / (40 + 20 * rank)
            assert sum(ledger.steps("training").values()) == 8
            assert epsilon_of([event.times(8)], 1e-5).upper == sites[rank][1]


def test_a_step_whose_sum_fails_stays_charged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(self: Any, *arguments: Any) -> Any:
        raise PrivflError("no contribution arrived")

    def part(transport: Any) -> Any:
        engine = privfl.PrivacyEngine(
            site=f"s{transport.rank}", comm=transport, ledger=tmp_path / f"{transport.rank}.ledger"
        )
        model, optimizer, loader = made(engine, records(transport.rank))
        before = flat(model)
        x, y = next(iter(loader))
        nn.functional.cross_entropy(model(x), y).backward()
        monkeypatch.setattr(GroupSum, "sum", fail)
        with pytest.raises(PrivflError):
            optimizer.step()
        engine.close()
        return torch.equal(flat(model), before)

    assert together(part) == [True] * 3
    for rank in range(3):
        with Ledger.read(tmp_path / f"{rank}.ledger") as ledger:
            assert sum(ledger.steps("training").values()) == 1


def test_ranks_with_other_models_do_not_sum():
    def part(transport: Any) -> Any:
        model = linear()
        if transport.rank == 2:
            nn.init.ones_(model.bias)
        return train(
            privfl.PrivacyEngine(site=f"s{transport.rank}", comm=transport), records(), model=model
        )

    results = in_threads(connect(3), part)
    assert all(
        isinstance(r, PrivflError) and "the model of rank 2 is not that of rank 0" in str(r)
        for r in results
    ), results


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (lambda rank: {"site": "same"}, "every rank must have a site of its own"),
        (lambda rank: {"collusion": 2}, "collusion 2 of 3 ranks cannot be withstood"),
        (lambda rank: {"collusion": 0}, "collusion 0 of 3 ranks cannot be withstood"),
    ],
)
def test_ranks_that_do_not_fit_are_refused_at_all(
    changes: Callable[[int], dict[str, Any]], sentence: str
):
    def part(transport: Any) -> Any:
        return made(
            privfl.PrivacyEngine(
                **({"site": f"s{transport.rank}", "comm": transport} | changes(transport.rank))
            ),
            records(),
        )

    assert all(
        isinstance(r, PrivflError) and sentence in str(r) for r in in_threads(connect(3), part)
    )


def test_a_clipping_norm_that_changes_stops_the_step():
    def part(transport: Any) -> Any:
        model, optimizer, loader = made(
            privfl.PrivacyEngine(site=f"s{transport.rank}", comm=transport), records()
        )
        optimizer.max_grad_norm = 2.0
        x, y = next(iter(loader))
        nn.functional.cross_entropy(model(x), y).backward()
        with pytest.raises(PrivflError, match="cannot change during training"):
            optimizer.step()

    together(part)


def test_opacus_names_are_kept():
    """Whoever knows Opacus' engine finds every public method, and the arguments of the two that
    make things private.
    """
    for name in vars(opacus.PrivacyEngine):
        assert name.startswith("_") or hasattr(privfl.PrivacyEngine, name), name
    assert issubclass(privfl.PrivacyEngine, opacus.PrivacyEngine)


def test_the_example_runs_under_mpiexec(tmp_path: Path):
    job = run_job(
        3,
        [sys.executable, str(ROOT / "examples" / "bring_your_own_loop" / "train.py")],
        cwd=tmp_path,
        env={"OMP_NUM_THREADS": "1"},
    )
    assert job.code == 0, job.err
    # Lines of several ranks may run into each other.
    lines = sorted(re.findall(r"site (\d): accuracy (0\.\d{4}), epsilon (\d\.\d{4})", job.out))
    assert [site for site, *_ in lines] == ["0", "1", "2"]
    assert len({tuple(rest) for _, *rest in lines}) == 1
    accuracy, epsilon = (float(number) for number in lines[0][1:])
    assert accuracy > 0.8
    assert epsilon <= 2.0
    assert {p.name for p in tmp_path.glob("*.ledger")} == {
        f"site{rank}.ledger" for rank in range(3)
    }
