"""A process that charges and releases, as a site does, until it ends or is ended: `python -m
tests.ledger.worker LEDGER RELEASED ROUNDS`.

Everything it does to the ledger and to the outside is announced to `tick`, just before and just
after, so that it can be killed there.
"""

from __future__ import annotations

import functools
import os
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from tests.ledger.ledgers import CHEAP, METRICS, open_ledger


def release(released: Path, charge: int) -> None:
    """What a charge paid for leaves: from now on everybody has seen it."""
    file = os.open(released, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, f"{charge}\n".encode())
    os.fsync(file)
    os.close(file)


def work(path: Path, released: Path, rounds: int, tick: Callable[[], None] = lambda: None) -> None:
    """Open the ledger and run: every third round a new mechanism until there are no more, some
    rounds with metrics, some taken back.
    """

    class Announcing(sqlite3.Connection):
        def execute(self, *arguments: Any) -> sqlite3.Cursor:
            tick()
            try:
                return super().execute(*arguments)
            finally:
                tick()

    def leave(charge: int) -> None:
        tick()
        release(released, charge)
        tick()

    with (
        mock.patch.object(
            sqlite3, "connect", functools.partial(sqlite3.connect, factory=Announcing)
        ),
        open_ledger(path) as ledger,
    ):
        run = f"{len(ledger.rows):032x}"
        ledger.begin_run(run, {"rounds": rounds})
        for round_ in range(1, rounds + 1):
            charge = ledger.charge(
                "training", CHEAP[round_ // 3 % len(CHEAP)].times(3), run, round_
            )
            if round_ % 4 == 2:
                ledger.refund(charge, "peer")
                continue
            ledger.make_final(charge)
            leave(charge.number)
            if round_ % 5 == 1:
                charge = ledger.charge("evaluation", METRICS, run, round_)
                ledger.make_final(charge)
                leave(charge.number)


if __name__ == "__main__":
    work(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
