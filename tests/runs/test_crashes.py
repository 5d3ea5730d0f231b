"""Killed at any instant, a site's ledger shows at least everything that left, and the next run
goes on with it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from privfl.ledger import Ledger
from tests.ledger.ledgers import METRICS, RUN, STEP, open_ledger


@pytest.fixture
def job(small: Path, tmp_path: Path) -> Any:
    """Runs the federation until its N-th point; gives its exit code and what it printed."""
    sites = tmp_path / "sites"
    sites.mkdir()
    for site in ("aa", "bbb"):
        (sites / f"{site}.yaml").write_text(
            f"ledger: ../{site}.ledger\nbudget: {{epsilon: 400, delta: 1.0e-5}}\n"
        )

    def run(point: int) -> tuple[int, str]:
        arguments = [
            str(small),
            str(sites),
            str(tmp_path / "runs"),
            str(tmp_path / "left"),
            str(point),
        ]
        command = [sys.executable, "-m", "tests.jobs.killed_run", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        return done.returncode, done.stdout + done.stderr

    return run


def everything_that_left_is_in_the_ledger(tmp_path: Path) -> int:
    if not (tmp_path / "aa.ledger").exists() or not (tmp_path / "left").read_text():
        return 0
    with Ledger.read(tmp_path / "aa.ledger") as ledger:
        assert ledger.problems() == []
        charged = {
            (row.run, row.round, row.account) for row in ledger.charges() if row.kind == "charge"
        }
        refunded = {
            (row.run, row.round, row.account) for row in ledger.charges() if row.kind == "refund"
        }
    left = [tuple(json.loads(line)) for line in (tmp_path / "left").read_text().splitlines()]
    assert set(left) <= charged - refunded
    return len(left)


def _count(job: Any) -> int:
    code, said = job(0)
    result = json.loads(said)
    assert code == 0
    assert result["codes"] == ["0", "0", "0"], result["err"]
    return int(result["points"])


def test_a_run_that_was_killed(job: Any, tmp_path: Path):
    # On a new ledger, and on those that the runs before left: five writes of three statements and
    # more, six messages.
    for point in (23, 35, 52):
        assert job(point)[0] == -signal.SIGKILL
        everything_that_left_is_in_the_ledger(tmp_path)
    left = everything_that_left_is_in_the_ledger(tmp_path)
    assert left > 2
    assert _count(job) > 52, "the next run goes on with the same ledger"
    assert everything_that_left_is_in_the_ledger(tmp_path) > left


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_run_that_was_killed_anywhere(job: Any, tmp_path: Path):
    """Every point of a run, each killed run going on with the ledger that the one before left."""
    point = 1
    while job(point)[0] == -signal.SIGKILL:
        everything_that_left_is_in_the_ledger(tmp_path)
        point += 1
    assert point > 40
    assert everything_that_left_is_in_the_ledger(tmp_path) > point


def test_that_check_sees_a_release_before_its_charge(tmp_path: Path):
    """Nothing was charged in round 4, and what was charged at first in round 3 was given back."""
    left = [[RUN, 1, "training"], [RUN, 1, "evaluation"], [RUN, 2, "training"]]
    with open_ledger(tmp_path / "aa.ledger") as ledger:
        ledger.begin_run(RUN, {})
        for run, round_, account in left:
            ledger.charge(account, STEP if account == "training" else METRICS, run, round_)
        ledger.refund(ledger.charge("training", STEP, RUN, 3), "peer")
    for early in (
        [RUN, 4, "training"],
        [RUN, 3, "training"],
        [RUN, 2, "evaluation"],
        ["cd" * 16, 1, "training"],
    ):
        (tmp_path / "left").write_text("".join(json.dumps(line) + "\n" for line in left))
        assert everything_that_left_is_in_the_ledger(tmp_path) == 3
        with open(tmp_path / "left", "a") as file:
            file.write(json.dumps(early) + "\n")
        with pytest.raises(AssertionError):
            everything_that_left_is_in_the_ledger(tmp_path)
