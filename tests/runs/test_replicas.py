"""Replicas of fedsgd on processors that compute a little differently: one is adopted if it is
near, and the run stops if it is not.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

from tests.conftest import edit, run_twin

pytestmark = pytest.mark.usefixtures("trainers_as_threads")


def drift(monkeypatch: pytest.MonkeyPatch, by: float) -> None:
    """At site bbb every parameter comes out off by this part, as on another processor."""
    step = torch.optim.SGD.step

    def drifting(self: torch.optim.SGD, *arguments: Any) -> None:
        step(self, *arguments)
        if threading.current_thread().name == "bbb":
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.mul_(1.0 + by)

    monkeypatch.setattr(torch.optim.SGD, "step", drifting)


@pytest.fixture
def steps(small: Path) -> Path:
    """The small experiment as secure DP-SGD at three sites."""
    edit(
        small,
        "sites: [aa, bbb]\nrounds: 2\nlocal_steps: 3\n",
        "sites: [aa, bbb, cccc]\nrounds: 4\nalgorithm: fedsgd\n",
    )
    edit(small, "privacy: {", "privacy: {noise: distributed, ")
    return small


def test_a_replica_that_is_near_is_adopted_and_noted(
    steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drift(monkeypatch, 1e-6)
    twin = run_twin(steps, output=tmp_path, ranks=4)
    assert twin.codes == [0] * 4, twin.err
    rounds = [json.loads(line) for line in (twin.folder / "rounds.jsonl").read_text().splitlines()]
    assert all(record["adopted"] == ["bbb"] for record in rounds)
    files = [
        load_file(twin.folder / "sites" / site / "model.safetensors")
        for site in ("aa", "bbb", "cccc")
    ]
    assert all((files[0][name] == other[name]).all() for other in files[1:] for name in files[0])
    assert "took the replica of site aa" in (twin.folder / "sites" / "bbb" / "site.log").read_text()


def test_a_replica_that_is_far_stops_the_run(
    steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drift(monkeypatch, 1e-3)
    twin = run_twin(steps, output=tmp_path, ranks=4)
    assert twin.codes == [2] * 4
    assert "site bbb: the sites' replicas differ by up to" in twin.err


def test_equal_replicas_are_not_lent(steps: Path, tmp_path: Path):
    twin = run_twin(steps, output=tmp_path, ranks=4)
    assert twin.codes == [0] * 4, twin.err
    assert "adopted" not in (twin.folder / "rounds.jsonl").read_text()
