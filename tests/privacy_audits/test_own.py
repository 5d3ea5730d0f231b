"""Canaries in a user's own model: an experiment, and a loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import privacy_audits
import privfl
import privfl.dp.optimizer
from privacy_audits.audits import experiment
from privacy_audits.audits.own import Gradients
from privacy_audits.result import AuditResult, Verdict
from privacy_audits.targets.inserted import MadeUp, Records
from privfl.config import demo_path
from privfl.errors import PrivflError

_RECORDS = TensorDataset(torch.randn(150, 30), torch.arange(150) % 10)


def _model() -> torch.nn.Module:
    return torch.nn.Linear(30, 10)


def _loop(engine: privfl.PrivacyEngine, watched: bool = True) -> privacy_audits.Canaries:
    model = _model()
    canaries = privacy_audits.Canaries(_RECORDS, model, cross_entropy)
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(canaries.training, batch_size=45),
        noise_multiplier=12.0,
        max_grad_norm=1.0,
    )
    if watched:
        canaries.watch(optimizer)
    for _ in range(8):
        for inputs, targets in loader:
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    return canaries


def _audited() -> tuple[AuditResult, ...]:
    with privfl.PrivacyEngine(site="zurich") as engine:
        return privacy_audits.audit(engine, _loop(engine))


def test_a_loop_is_consistent_and_one_without_noise_is_refuted(monkeypatch: pytest.MonkeyPatch):
    for result in _audited():
        assert result.claim.epsilon is not None
        assert 0.2 < result.claim.epsilon < 1.0
        assert result.verdict is Verdict.CONSISTENT
    gaussian = privfl.dp.optimizer.gaussian
    monkeypatch.setattr(privfl.dp.optimizer, "gaussian", lambda *given: 1e-6 * gaussian(*given))
    assert {result.verdict for result in _audited()} == {Verdict.REFUTED}


def test_what_cannot_be_audited_is_refused(tmp_path: Path):
    with (
        privfl.PrivacyEngine(
            site="zurich", ledger=tmp_path / "zurich.ledger", budget=(8.0, 1e-5)
        ) as engine,
        pytest.raises(PrivflError, match="keeps the ledger"),
    ):
        privacy_audits.audit(engine, _loop(engine))
    with (
        privfl.PrivacyEngine(site="zurich") as engine,
        pytest.raises(PrivflError, match="saw 0 of the engine's"),
    ):
        privacy_audits.audit(engine, _loop(engine, watched=False))
    with privfl.PrivacyEngine(site="zurich") as engine:
        canaries = privacy_audits.Canaries(_RECORDS, _model(), cross_entropy)
        _, optimizer, _ = engine.make_private(
            module=(model := torch.nn.Linear(3, 2)),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(torch.randn(50, 3)), batch_size=10),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
        with pytest.raises(PrivflError, match="other parameters"):
            canaries.watch(optimizer)


def test_canaries_have_the_shape_and_the_values_of_records():
    records = Records([(torch.tensor([i, 100 + i]), i % 3) for i in range(40)])
    canaries = MadeUp(records, 500, seed=1)
    inputs = torch.stack([canaries[row][0] for row in range(500)])
    targets = torch.stack([canaries[row][1] for row in range(500)])
    assert inputs.dtype == records[0][0].dtype
    assert targets.dtype == records[0][1].dtype
    assert set(inputs[:, 0].tolist()) == set(range(40))
    assert set(inputs[:, 1].tolist()) == set(range(100, 140))
    assert set(targets.tolist()) == {0, 1, 2}
    # Not records: elements are of different ones.
    assert (inputs[:, 1] - inputs[:, 0] != 100).float().mean() > 0.9
    again = MadeUp(records, 500, seed=1)
    assert all(torch.equal(again[row][0], canaries[row][0]) for row in range(500))


def test_gradients_are_those_of_autograd_and_clipped():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    records = Records([(torch.randn(4) * 10**k, k % 2) for k in range(-3, 3)])
    gradients = Gradients(model, cross_entropy)
    rng = np.random.default_rng(1)
    replica = rng.normal(size=gradients.size)
    gradients.load(replica)
    rows = np.concatenate(list(gradients.pieces(records, 0.5)))
    torch.nn.utils.vector_to_parameters(torch.from_numpy(replica).float(), model.parameters())
    for row, (x, y) in zip(rows, (records[k] for k in range(6)), strict=True):
        model.zero_grad()
        cross_entropy(model(x[None]), y[None]).backward()
        expected = torch.cat([p.grad.flatten() for p in model.parameters()]).double().numpy()
        expected *= min(1.0, 0.5 / max(np.linalg.norm(expected), 1e-30))
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("insecure_test_seed=1", "there is no claim to audit; remove it"),
        ("model=digits.py:nothing", "defines no 'nothing'"),
    ],
)
def test_an_experiment_that_cannot_be_audited_is_refused(setting: str, sentence: str):
    with pytest.raises(PrivflError, match=sentence):
        experiment.target(demo_path(), None, (setting,))


def test_records_with_a_ledger_are_refused(tmp_path: Path):
    for site in ("north", "east", "south", "west"):
        budget = "ledger: north.ledger\nbudget: {epsilon: 2, delta: 1.0e-5}\n"
        (tmp_path / f"{site}.yaml").write_text(budget if site == "north" else "")
    with pytest.raises(PrivflError, match=r"north.yaml: site north keeps a ledger"):
        experiment.target(demo_path(), tmp_path, ())


@pytest.mark.slow
@pytest.mark.parametrize("planted", ["", "noise-forgotten"])
def test_an_experiment_is_consistent_and_one_without_noise_is_refuted(tmp_path: Path, planted: str):
    through = ("privacy_audits.sabotaged", planted, "--") if planted else ()
    settings = ("sites=[north, east, south]", "rounds=15", "local_steps=1", "algorithm=fedsgd")
    noise = "privacy.noise=distributed"
    target = experiment.target(demo_path(), None, (*settings, noise))
    results = list(experiment.results(target, tmp_path, through, lambda text: None))
    assert len(results) == 2
    expected = Verdict.REFUTED if planted else Verdict.CONSISTENT
    assert {result.verdict for result in results} == {expected}
