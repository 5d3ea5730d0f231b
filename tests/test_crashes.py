"""Killed at any instant, a site's book shows at least everything that left, and the next run
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


def everything_that_left_is_in_the_book(tmp_path: Path) -> int:
    if not (tmp_path / "aa.ledger").exists() or not (tmp_path / "left").read_text():
        return 0
    with Ledger.read(tmp_path / "aa.ledger") as book:
        assert book.problems() == []
        charged = {
            (row.run, row.round, row.account) for row in book.charges() if row.kind == "charge"
        }
        refunded = {
            (row.run, row.round, row.account) for row in book.charges() if row.kind == "refund"
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
    points = _count(job)
    # Five writes of three statements and more, six messages.
    assert points > 40
    # A later run has fewer: the book and its mechanisms are there.
    for point in (points // 3, points // 2, points - 12):
        assert job(point)[0] == -signal.SIGKILL
        everything_that_left_is_in_the_book(tmp_path)
    assert everything_that_left_is_in_the_book(tmp_path) > 6
    assert _count(job) <= points, "the next run goes on with the same book"


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_run_that_was_killed_anywhere(job: Any, tmp_path: Path):
    """Every point of a run, each killed run going on with the book that the one before left."""
    point = 1
    while job(point)[0] == -signal.SIGKILL:
        everything_that_left_is_in_the_book(tmp_path)
        point += 1
    assert point > 40
    assert everything_that_left_is_in_the_book(tmp_path) > point


def test_that_check_sees_a_release_before_its_charge(job: Any, tmp_path: Path):
    _count(job)
    with open(tmp_path / "left", "a") as file:
        file.write(json.dumps(["ab" * 16, 1, "training"]) + "\n")
    with pytest.raises(AssertionError):
        everything_that_left_is_in_the_book(tmp_path)
