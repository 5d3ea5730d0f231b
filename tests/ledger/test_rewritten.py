"""Ledgers that a hand changed and whose chain fits all the same: opening one, or a fresh look,
finds what no run would have written.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from privfl.errors import DamagedError
from privfl.ledger import Ledger
from tests.ledger.ledgers import RUN, STEP, a_dozen_rows, by_sql, limit, open_ledger, rewrite


def test_a_refund_after_its_run_is_found(path: Path):
    """Whoever can write the file could else take back old charges under a chain and heads that
    fit.
    """
    a_dozen_rows(path).close()

    def refund(rows: list[list[object]]) -> None:
        rows.append([13, rows[1][1], "run", "cd" * 16, 0, "", 0, 0, "{}", ""])
        rows.append(
            [14, *rows[11][1:2], "refund", *rows[11][3:8], '{"cause": "peer", "charge": 12}', ""]
        )

    rewrite(path, refund)
    with pytest.raises(DamagedError, match="would not have written"):
        Ledger.read(path)


def test_triggers_are_refused(path: Path):
    a_dozen_rows(path).close()
    by_sql(
        path,
        "CREATE TRIGGER eat AFTER INSERT ON rows BEGIN DELETE FROM rows WHERE number = new.number; "
        "END",
    )
    with pytest.raises(DamagedError, match="triggers or views"):
        open_ledger(path)


# -- a rewritten ledger whose chain fits -----------------------------------------------------------


def found_by_a_look(path: Path) -> list[str]:
    """What opening and `problems` find together."""
    try:
        with Ledger.read(path) as ledger:
            return ledger.problems()
    except DamagedError as error:
        return [str(error)]


def test_cached_divergences_that_are_not_those_of_the_event_are_found(path: Path):
    a_dozen_rows(path).close()

    def cheaper(rows: list[list[object]]) -> None:
        with Ledger.read(path) as ledger:
            value = ledger.rows[2].facts()["divergences"][30]
        rows[2][8] = str(rows[2][8]).replace(repr(value), repr(value * 0.999), 1)

    rewrite(path, cheaper)
    assert found_by_a_look(path) == ["the cached divergences of row 3 are not those of its event"]


def test_a_charge_beyond_the_budget_is_found(path: Path):
    a_dozen_rows(path).close()

    def more(rows: list[list[object]]) -> None:
        rows[9][7] = 10**6

    rewrite(path, more)
    assert found_by_a_look(path) == [
        f"the charge in row {number} is beyond the budget" for number in (10, 12)
    ]


def test_a_budget_that_was_filled_exactly_is_no_problem(path: Path):
    with open_ledger(path) as ledger:
        while room := limit().times(ledger.spent("training"), limit().cost(STEP)):
            ledger.charge("training", STEP.times(min(room, 37)), RUN, 1)
    assert found_by_a_look(path) == []


def nobody_charged(rows: list[list[object]]) -> None:
    rows[9][6] = 4  # the row of a charge


def no_such_mechanism(rows: list[list[object]]) -> None:
    rows[9][6] = 77


def negative(rows: list[list[object]]) -> None:
    rows[11][7] = -7


def refunded_twice(rows: list[list[object]]) -> None:
    rows.append(list(rows[7]))


def larger_refund(rows: list[list[object]]) -> None:
    rows[7][7] = 25


def refund_of_nothing(rows: list[list[object]]) -> None:
    rows[7][8] = '{"cause": "peer", "charge": 5}'


def no_such_kind(rows: list[list[object]]) -> None:
    rows[11][2] = "gift"


def no_such_account(rows: list[list[object]]) -> None:
    rows[11][5] = "holiday"


def second_beginning(rows: list[list[object]]) -> None:
    rows.append(list(rows[0]))


def no_beginning(rows: list[list[object]]) -> None:
    del rows[0]
    for row in rows:
        row[6] = max(0, int(str(row[6])) - 1)


def cut_vector(rows: list[list[object]]) -> None:
    body = str(rows[8][8])
    rows[8][8] = body.replace(", " + body.split("[")[1].split("]")[0].split(", ")[-1] + "]", "]")


REWRITTEN = [
    nobody_charged,
    no_such_mechanism,
    negative,
    refunded_twice,
    larger_refund,
    refund_of_nothing,
    no_such_kind,
    no_such_account,
    second_beginning,
    no_beginning,
    cut_vector,
]


@pytest.mark.parametrize("change", REWRITTEN, ids=lambda change: change.__name__)
def test_what_this_program_never_writes_is_found(path: Path, change: object):
    a_dozen_rows(path).close()
    rewrite(path, change)
    assert found_by_a_look(path) != []
