"""Experiments with distributed noise: which are refused, and what trains."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import TASK, edit, run_twin
from tests.inside import Seen
from tests.ledgers import read, run_ledgers
from tests.runs.test_fedsgd import RANKS, SITES
from tests.runs.test_run import user_module

# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            ["local_steps=2"],
            "local_steps is 2, but in fedsgd every step is a sum over all sites; set local_steps: "
            "1",
        ),
        (
            ["privacy.collusion=0"],
            "privacy.collusion is 0, but each site could subtract its own share",
        ),
        (
            ["privacy.collusion=2"],
            "privacy.collusion is 2 of 3 sites: so many could see another site's gradients alone; "
            "at most 1",
        ),
        (
            ["sites=[aa, bbb]"],
            "sites are 2, but fedsgd needs 3: of two, each would see the other's gradients",
        ),
        (["privacy.noise=site"], "privacy.noise is site, but algorithm fedsgd needs distributed"),
        (["algorithm=fedavg"], "privacy.noise is distributed, but algorithm fedavg needs site"),
        (["weights=records"], "weights: records is for fedavg"),
        (
            ["secure_aggregation.range=agreed"],
            "secure_aggregation.range agreed does not fit algorithm fedsgd",
        ),
        (["secure_aggregation.rounding=stochastic"], "secure_aggregation.rounding is for fedavg"),
    ],
)
def test_experiments_that_do_not_fit(
    steps: Path, tmp_path: Path, settings: list[str], sentence: str
):
    twin = run_twin(steps, *settings, output=tmp_path / "runs", ranks=RANKS)
    assert twin.codes == [2] * RANKS
    assert sentence in twin.err
    assert len(twin.err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("trainers_as_threads")
def test_batch_norm_is_refused(steps: Path, tmp_path: Path):
    edit(
        tmp_path / "task.py",
        "return nn.Linear(5, 2)",
        "return nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 2))",
    )
    twin = run_twin(steps, output=tmp_path / "runs", ranks=RANKS)
    assert twin.codes == [2] * RANKS
    assert "is a BatchNorm1d" in twin.err
    assert len(twin.err.splitlines()) == 1


@pytest.mark.usefixtures("trainers_as_threads")
def test_values_of_few_bits_are_refused_for_their_grid(steps: Path, tmp_path: Path):
    seen = Seen()
    twin = run_twin(
        steps,
        "secure_aggregation.value_bits=12",
        output=tmp_path / "runs",
        ranks=RANKS,
        observer=seen,
    )
    assert twin.codes == [2] * RANKS
    assert "12 parameters need a finer grid than the bits of a value allow" in twin.err
    assert "raise secure_aggregation.value_bits (28 at most" in twin.err
    assert len(twin.err.splitlines()) == 1
    assert not seen.integers


@pytest.mark.usefixtures("trainers_as_threads")
def test_a_policy_about_colluders_and_what_would_pass(steps: Path, tmp_path: Path):
    folder = tmp_path / "sites"
    folder.mkdir()
    for site in (*SITES, "d"):
        (folder / f"{site}.yaml").write_text("least_collusion: 2\n" if site == "bbb" else "{}\n")
    four = ("sites=[aa, bbb, cccc, d]", "rounds=1")
    twin = run_twin(steps, *four, output=tmp_path / "runs", ranks=5, sites=folder)
    assert twin.codes == [2] * 5
    assert (
        "the policy of site bbb refuses this experiment (least_collusion in its site file): "
        "privacy.collusion is 1" in twin.err
    )
    assert "privacy.collusion 2 would pass" in twin.err
    assert len(twin.err.splitlines()) == 1
    twin = run_twin(
        steps, *four, "privacy.collusion=2", output=tmp_path / "runs", ranks=5, sites=folder
    )
    assert twin.codes == [0] * 5, twin.err


# -- what trains -----------------------------------------------------------------------------------

TIED = """
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.output = nn.Linear(4, 6, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, x):
        return self.output(self.embedding(x.abs().long().clamp(max=5)).mean(dim=1))


def model():
    return Tied()
"""
GROUPS = """
def model():
    return nn.Sequential(
        nn.Linear(5, 8), nn.GroupNorm(2, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2)
    )
"""
FROZEN = """
def model():
    layers = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    layers[0].weight.requires_grad = False
    with torch.no_grad():
        layers[0].weight.fill_(0.25)
    return layers
"""


@pytest.mark.usefixtures("trainers_as_threads")
@pytest.mark.parametrize(
    ("model", "parameters"),
    [(TIED, 24), (GROUPS, 82), (FROZEN, 14)],
    ids=["tied", "GroupNorm", "frozen"],
)
def test_models_that_train(steps: Path, tmp_path: Path, model: str, parameters: int):
    (tmp_path / "task.py").write_text(TASK + model)
    seen = Seen()
    twin = run_twin(
        steps,
        "rounds=5",
        "optimizer={name: adam, lr: 0.05}",
        output=tmp_path / "runs",
        ranks=RANKS,
        observer=seen,
    )
    assert twin.codes == [0] * RANKS, twin.err
    for site in SITES:
        assert np.array_equal(np.array(seen.replicas[site]), np.array(seen.replicas["aa"]))
        assert seen.totals[site][0].shape == (parameters,)
        assert all(np.abs(total).max() > 0 for total in seen.sums[site])
    tensors = load_file(twin.folder / "model.safetensors")
    again = user_module(tmp_path / "task.py").model()
    again.load_state_dict(tensors, strict=True)
    trained = torch.cat(
        [p.detach().reshape(-1) for p in again.parameters() if p.requires_grad]
    ).numpy()
    assert np.array_equal(trained, seen.replicas["aa"][-1])
    assert (seen.replicas["aa"][0] != trained).mean() > 0.9
    if "fill_" in model:
        assert (tensors["0.weight"] == 0.25).all()


@pytest.mark.usefixtures("trainers_as_threads")
def test_a_batch_without_records_is_a_step_like_any_other(steps: Path, tmp_path: Path):
    seen = Seen()
    twin = run_twin(
        steps,
        "rounds=30",
        "sampling_rate=0.01",
        output=tmp_path / "runs",
        ranks=RANKS,
        observer=seen,
    )
    assert twin.codes == [0] * RANKS, twin.err
    empty = {site: np.array([not total.any() for total in seen.sums[site]]) for site in SITES}
    # 0.99^100 = 0.37 of all: none in 90 would come once in 10^18 runs.
    assert 0 < sum(int(found.sum()) for found in empty.values()) < 90
    for site in SITES:
        assert all(np.abs(integers).max() > 0 for integers in seen.integers[site]), (
            "an empty batch cannot be told by its noise"
        )
        assert sum(read(run_ledgers(twin)[site]).steps("training").values()) == 30
        assert json.loads((twin.folder / "summary.json").read_text())["sites"][site]["steps"] == 30


@pytest.mark.usefixtures("trainers_as_threads")
def test_a_target_epsilon_gives_noise_that_keeps_to_it(steps: Path, tmp_path: Path):
    seen = Seen()
    target = "privacy={noise: distributed, target_epsilon: 2.0, delta: 1.0e-5, max_grad_norm: 1.0}"
    twin = run_twin(steps, "rounds=5", target, output=tmp_path / "runs", ranks=RANKS, observer=seen)
    assert twin.codes == [0] * RANKS, twin.err
    for site, facts in json.loads((twin.folder / "summary.json").read_text())["sites"].items():
        assert 1.9 < facts["epsilon"] <= 2.0
        grid = seen.algorithms[site].grid
        assert grid.deviation * grid.step == pytest.approx(facts["noise_multiplier"] / math.sqrt(2))
