"""Whatever ends the process: what was released was charged before, and the ledger goes on where it
stopped.
"""

from __future__ import annotations

import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from privfl.errors import PrivflError
from privfl.ledger import Ledger, Row
from tests.conftest import ROOT
from tests.ledger.ledgers import CHEAP, METRICS, RUN, STEP, limit, open_ledger
from tests.ledger.worker import work

pytestmark = pytest.mark.slow

ROUNDS = 16


def child(part: Callable[[], object]) -> int:
    """Run ``part`` in a process of its own; how that ended, as `waitstatus`: 0, or less than 0
    for a signal.
    """
    process = started(part)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def started(part: Callable[[], object]) -> int:
    """The same, not waited for; its number."""
    # Costs are cached by process: the child starts with them.
    for event in (*CHEAP, METRICS, STEP):
        limit().cost(event)
    process = os.fork()
    if process:
        return process
    code = 3
    try:
        part()
        code = 0
    except PrivflError:
        code = 2
    finally:
        os._exit(code)


def meaning(row: Row) -> tuple[object, ...]:
    """All of a row but when it was written and what depends on that."""
    return (
        row.kind,
        row.run,
        row.round,
        row.account,
        row.mechanism,
        row.steps,
        row.kind == "opened" or row.body,
    )


def released_in(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


def check(path: Path, released: Path, whole: list[tuple[object, ...]] | None = None) -> int:
    """What must hold after any end; how many rows were left.

    ``whole``: the rows of an undisturbed run, of which these are the first.
    """
    seen = released_in(released)
    try:
        with Ledger.read(path) as ledger:
            rows = list(ledger.rows)
            assert ledger.problems() == []
    except PrivflError as error:
        rows, said = [], str(error)
    assert rows or "holds nothing yet" in said or "there is no ledger" in said
    by_number = {row.number: row for row in rows}
    refunded = {row.facts()["charge"] for row in rows if row.kind == "refund"}
    for number in seen:
        assert by_number[number].kind == "charge"
        assert number not in refunded
    # All or none of what is written together.
    for before, after in itertools.pairwise([*rows, None]):
        if before is not None and before.kind == "mechanism":
            assert after is not None
            assert after.mechanism == before.number
    if whole is not None:
        assert [meaning(row) for row in rows] == whole[: len(rows)]
    with open_ledger(path) as ledger:
        assert ledger.rows[: len(rows)] == rows
        spent = ledger.spent("training")
        known = STEP in ledger.events.values()
        charge = ledger.charge("training", STEP, RUN, 99)
        assert charge.number == max(len(rows), 1) + (1 if known else 2)
        np.testing.assert_allclose(ledger.spent("training"), spent + limit().cost(STEP), rtol=1e-12)
        # What it says is as it was found, so that it can be killed again.
        ledger.refund(charge, "signal")
    assert not path.with_name(path.name + "-journal").exists()
    with Ledger.read(path) as ledger:
        assert ledger.problems() == []
        assert (ledger.spent("training") == spent).all()
    return len(rows)


def undisturbed(folder: Path) -> tuple[list[tuple[object, ...]], int]:
    """The rows of a run that nothing disturbs, and how many points it passes at which it could
    be killed.
    """
    counter = itertools.count()
    work(folder / "whole", folder / "whole.released", ROUNDS, lambda: next(counter) and None)
    with Ledger.read(folder / "whole") as ledger:
        assert {row.kind for row in ledger.rows} == {
            "opened",
            "run",
            "mechanism",
            "charge",
            "refund",
        }
        rows = [meaning(row) for row in ledger.rows]
    return rows, next(counter)


def killed_at_each(
    folder: Path, points: Iterable[int], whole: list[tuple[object, ...]]
) -> set[int]:
    """Kill a fresh run at each of these points; how many rows were left, of all."""
    left = set()
    for point in points:
        work_folder = folder / str(point)
        work_folder.mkdir()
        counter = itertools.count()

        def tick(point: int = point, counter: Iterable[int] = counter) -> None:
            if next(counter) == point:
                os.kill(os.getpid(), signal.SIGKILL)

        path, released = work_folder / "north.ledger", work_folder / "released"
        assert (
            child(
                lambda path=path, released=released, tick=tick: work(path, released, ROUNDS, tick)
            )
            == -signal.SIGKILL
        )
        left.add(check(path, released, whole))
    return left


def test_killed_at_some_points(tmp_path: Path):
    whole, points = undisturbed(tmp_path)
    assert points > 200
    left = killed_at_each(tmp_path, [*range(0, points, points // 10), 12, points - 1], whole)
    assert {0, len(whole)} < left


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_killed_at_every_point(tmp_path: Path):
    whole, points = undisturbed(tmp_path)
    left = killed_at_each(tmp_path, range(points), whole)
    # Every state between two transactions was met, and no other.
    together = [number for number, row in enumerate(whole, 1) if row[0] == "mechanism"]
    assert left == set(range(len(whole) + 1)) - set(together)


# -- in the middle of what SQLite does -------------------------------------------------------------


def killed_by_parent(folder: Path, times: int, seed: int) -> None:
    """Kill process after process that works on the same ledger, each at a random instant after a
    few releases.
    """
    rng = random.Random(seed)
    path, released = folder / "north.ledger", folder / "released"
    progress = []
    for _ in range(times):
        enough = len(released_in(released)) + rng.randrange(8)
        process = started(lambda: work(path, released, 10**6))
        late = time.monotonic() + 60
        while len(released_in(released)) < enough and time.monotonic() < late:
            time.sleep(0.0005)
        time.sleep(rng.uniform(0.0, 0.005))
        os.kill(process, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        progress.append(check(path, released))
    assert progress == sorted(progress)
    assert len(set(released_in(released))) == len(released_in(released)) >= times


def test_killed_at_a_few_random_instants(tmp_path: Path):
    killed_by_parent(tmp_path, 5, seed=1)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_killed_at_random_instants(tmp_path: Path):
    killed_by_parent(tmp_path, 60, seed=2)


def out_of_room(path: Path, released: Path, size: int, action: signal.Handlers) -> int:
    """A run of which no file may grow beyond ``size``: whoever writes further is killed in the
    middle of a write, or refused it.
    """

    def part() -> None:
        signal.signal(signal.SIGXFSZ, action)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        work(path, released, ROUNDS)

    return child(part)


def torn(folder: Path, sizes: Iterable[int]) -> None:
    whole, _ = undisturbed(folder)
    left = []
    for size, action in itertools.product(sizes, (signal.SIG_DFL, signal.SIG_IGN)):
        work_folder = folder / f"{size}-{action}"
        work_folder.mkdir()
        path, released = work_folder / "north.ledger", work_folder / "released"
        code = out_of_room(path, released, size, action)
        assert code == (-signal.SIGXFSZ if action == signal.SIG_DFL else 2)
        left.append(check(path, released, whole))
    assert max(left) > 10


def test_a_write_that_is_torn(tmp_path: Path):
    torn(tmp_path, [10, 600, 5000, 20_490, 29_000])


@pytest.mark.long
def test_writes_that_are_torn_anywhere(tmp_path: Path):
    torn(tmp_path, [*range(33, 33_000, 517), *range(4090, 4100), *range(8190, 8195)])


def test_no_room_at_all_is_one_sentence(tmp_path: Path):
    path, released = tmp_path / "north.ledger", tmp_path / "released"
    assert out_of_room(path, released, 0, signal.SIG_IGN) == 2
    check(path, released)


# The system calls that change a file, and how many rows of two rounds may be left after one of them
# never came.
CALLS = {
    "pwrite64": {0, 1, 2, 4, 6, 7},
    "fdatasync": {0, 1, 2, 4, 6, 7, 8},
    "unlink": {0, 1, 2, 4, 6, 7},
}


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("call", CALLS)
def test_killed_before_each_system_call_of_sqlite(tmp_path: Path, call: str):
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    left = set()
    for number in itertools.count(1):
        work_folder = tmp_path / str(number)
        work_folder.mkdir()
        path, released = work_folder / "north.ledger", work_folder / "released"
        command = [
            "strace",
            "-f",
            "-o",
            "/dev/null",
            "-e",
            f"inject={call}:signal=KILL:when={number}",
        ]
        done = subprocess.run(
            [*command, sys.executable, "-m", "tests.ledger.worker", path, released, "2"],
            cwd=ROOT,
            capture_output=True,
        )
        if done.returncode == 0:
            break
        if b"ptrace" in done.stderr:
            pytest.skip("this machine allows no tracing")
        assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), done.stderr
        left.add(check(path, released))
    assert left == CALLS[call]
