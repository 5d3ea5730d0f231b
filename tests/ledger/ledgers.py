"""Ledgers to try things on, and what a hand on the file can do to them."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

from privfl.accounting import (
    DiscreteGaussian,
    Event,
    Gaussian,
    MetricRelease,
    PoissonGaussian,
    RenyiFilter,
)
from privfl.ledger import Ledger
from privfl.ledger.rows import INSERT, SELECT, START, chained

RUN = "ab" * 16
STEP = PoissonGaussian(sampling_rate=0.02, noise_multiplier=1.0)
OTHER = DiscreteGaussian(sampling_rate=0.1, noise_multiplier=4.0, sensitivity=1.01)
METRICS = MetricRelease(metrics=("auc", "loss"), noise_multiplier=20.0)
# So cheap that thousands fit.
CHEAP = [Gaussian(noise_multiplier=noise) for noise in (500.0, 600.0, 700.0, 800.0)]


def limit(epsilon: float = 3.0, plan: Event = STEP) -> RenyiFilter:
    return RenyiFilter.planned(epsilon, 1e-5, plan)


def open_ledger(path: Path, epsilon: float = 3.0) -> Ledger:
    """The ledger of site 'north', with the same budget for both accounts."""
    return Ledger.write(
        path, "north", {"training": limit(epsilon), "evaluation": limit(epsilon, METRICS)}
    )


def a_dozen_rows(path: Path) -> Ledger:
    """An open ledger with a row of every kind: 12 of them."""
    ledger = open_ledger(path)
    ledger.begin_run(RUN, {"experiment": "heart", "rounds": 3})
    ledger.charge("training", STEP.times(10), RUN, 1)  # rows 3 and 4
    ledger.charge("evaluation", METRICS, RUN, 1)  # 5 and 6
    ledger.refund(ledger.charge("training", STEP.times(20), RUN, 2), "peer")  # 7 and 8
    ledger.charge("training", OTHER.times(2), RUN, 2)  # 9 and 10
    ledger.charge("evaluation", METRICS.times(2), RUN, 2)  # 11
    ledger.charge("training", STEP.times(7), RUN, 3)  # 12
    assert len(ledger.rows) == 12
    return ledger


def by_sql(path: Path, *statements: tuple[str, Iterable[object]] | str) -> None:
    """Change a ledger behind its back."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(
                *(
                    (statement,)
                    if isinstance(statement, str)
                    else (statement[0], tuple(statement[1]))
                )
            )


def rewrite(path: Path, change: Callable[[list[list[object]]], object]) -> None:
    """Change the columns of the rows as ``change`` does in place, number them again, and make
    the chain fit.
    """
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        rows = [list(row) for row in connection.execute(SELECT)]
        change(rows)
        connection.execute("BEGIN")
        connection.execute("DELETE FROM rows")
        before = START
        for number, row in enumerate(rows, 1):
            row[0] = number
            row[9] = before = chained(before, tuple(row[:9]))
            connection.execute(INSERT, row)
        connection.execute("COMMIT")
