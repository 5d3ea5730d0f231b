"""The ledger: what was charged is there after reopening, to the last bit, and nothing is charged
that the budget does not admit.
"""

from __future__ import annotations

import functools
import math
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from privfl.accounting import ACCOUNTS, Event, Gaussian, NonPrivate, epsilon_of
from privfl.errors import BudgetError, InternalError, PrivflError
from privfl.ledger import Head, Ledger, head_bytes
from tests.ledger.ledgers import (
    METRICS,
    OTHER,
    RUN,
    STEP,
    a_dozen_rows,
    limit,
    open_ledger,
    rewrite,
)

# -- writing and reading ---------------------------------------------------------------------------


def test_a_reopened_ledger_says_the_same(path: Path):
    with a_dozen_rows(path) as ledger:
        rows, head = list(ledger.rows), ledger.head
        spent = {account: ledger.spent(account) for account in ACCOUNTS}
        steps = {account: ledger.steps(account) for account in ACCOUNTS}
        assert ledger.problems() == []
    for again in (Ledger.read(path), open_ledger(path)):
        with again:
            assert (again.rows, again.head, again.site) == (rows, head, "north")
            assert again.filters == {"training": limit(), "evaluation": limit(plan=METRICS)}
            assert again.problems() == []
            for account in ACCOUNTS:
                np.testing.assert_array_equal(again.spent(account), spent[account])
                assert again.steps(account) == steps[account]
    assert (head.rows, head.hash) == (12, rows[-1].hash)


def test_what_is_spent_is_what_was_charged(path: Path):
    with a_dozen_rows(path) as ledger:
        for account, events in (
            ("training", [STEP.times(17), OTHER.times(2)]),
            ("evaluation", [METRICS.times(3)]),
        ):
            expected = sum(ledger.filters[account].cost(event) for event in events)
            np.testing.assert_allclose(ledger.spent(account), expected, rtol=1e-12)
            charged = [
                ledger.events[number].times(count)
                for number, count in ledger.steps(account).items()
                if count
            ]
            assert sorted(charged, key=repr) == sorted(events, key=repr)
            assert (
                ledger.filters[account].epsilon_of(ledger.spent(account))
                >= epsilon_of(events, 1e-5).upper
            )


def test_each_mechanism_is_described_once(path: Path):
    with a_dozen_rows(path) as ledger:
        assert [row.number for row in ledger.rows if row.kind == "mechanism"] == [3, 5, 9]
        assert [(row.kind, row.number) for row in ledger.charges()] == [
            (ledger.rows[n - 1].kind, n) for n in (4, 6, 7, 8, 10, 11, 12)
        ]
        np.testing.assert_array_equal(ledger.vector(3), limit().cost(STEP))
    with open_ledger(path) as ledger:
        ledger.charge("training", STEP, RUN, 4)
        assert ledger.rows[-1].mechanism == 3
        assert len(ledger.rows) == 13


def test_steps_charged_to_a_round(path: Path):
    with a_dozen_rows(path) as ledger:
        ledger.begin_run("cd" * 16, {})
        ledger.charge("training", STEP.times(5), "cd" * 16, 1)
        ledger.charge("training", STEP.times(6), "cd" * 16, 1)
        ledger.charge("training", STEP.times(9), "cd" * 16, 2)
        assert ledger.charged("training", "cd" * 16, 1) == 11
        assert ledger.charged("training", "cd" * 16, 2) == 9
        assert ledger.charged("training", "cd" * 16, 3) == 0
        assert ledger.charged("evaluation", "cd" * 16, 1) == 0
        ledger.refund(ledger.rows[-1], "signal")
        assert ledger.charged("training", "cd" * 16, 2) == 0


def test_steps_charged_to_a_round_before_a_new_mechanism_came_up(path: Path):
    with open_ledger(path) as ledger:
        ledger.begin_run(RUN, {})
        ledger.charge("training", STEP.times(10), RUN, 1)
        ledger.charge("evaluation", METRICS, RUN, 1)
        assert ledger.charged("training", RUN, 1) == 10


def test_a_ledger_may_have_no_limit(path: Path):
    with Ledger.write(path, "north", {}) as ledger:
        ledger.charge("training", STEP.times(10**6), RUN, 1)
        ledger.charge("evaluation", NonPrivate(what="all labels"), RUN, 1)
        assert np.isinf(ledger.spent("evaluation")).all()
    with Ledger.read(path) as ledger:
        assert np.isinf(ledger.spent("evaluation")).all()
        np.testing.assert_array_equal(ledger.spent("training"), 10**6 * limit().cost(STEP))
        assert ledger.problems() == []


def test_another_sites_ledger_is_refused(path: Path):
    a_dozen_rows(path).close()
    before = path.read_bytes()
    with pytest.raises(
        PrivflError, match=r"belongs to site north, not to south; name another file"
    ):
        Ledger.write(path, "south", {})
    assert path.read_bytes() == before
    open_ledger(path).close()


def test_the_first_row_decides_on_the_budget(path: Path):
    open_ledger(path, 3.0).close()
    with open_ledger(path, 9.0) as ledger:
        assert ledger.filters["training"].epsilon == 3.0


# -- the budget ------------------------------------------------------------------------------------


def test_a_budget_admits_exactly_so_many_charges(path: Path):
    with open_ledger(path) as ledger:
        budget = ledger.filters["training"]
        many = budget.times(budget.nothing(), 20 * budget.cost(STEP))
        assert many == pytest.approx(budget.times(budget.nothing(), budget.cost(STEP)) / 20, abs=1)
        for number in range(many):
            ledger.charge("training", STEP.times(20), RUN, number)
        with pytest.raises(BudgetError, match="does not admit 20 more steps"):
            ledger.charge("training", STEP.times(20), RUN, many)
        left = budget.times(ledger.spent("training"), budget.cost(STEP))
        assert 0 <= left < 20
        if left:
            ledger.charge("training", STEP.times(left), RUN, many)
        with pytest.raises(BudgetError, match="0 would fit"):
            ledger.charge("training", STEP, RUN, many + 1)
        assert budget.epsilon_of(ledger.spent("training")) <= 3.0
        assert ledger.problems() == []


@pytest.mark.parametrize(
    "event",
    [
        STEP.times(100_000),
        OTHER.times(100_000),
        NonPrivate(what="x"),
        Gaussian(noise_multiplier=0.0),
    ],
)
def test_a_refused_charge_leaves_nothing(path: Path, event: Event):
    with open_ledger(path) as ledger:
        before, file = list(ledger.rows), path.read_bytes()
        with pytest.raises(
            BudgetError,
            match=(
                r"budget of site north for its training records \(epsilon 3 at delta 1e-05, "
                r"ledger "
            ),
        ):
            ledger.charge("training", event, RUN, 1)
        assert ledger.rows == before
        assert path.read_bytes() == file
        ledger.charge("training", STEP, RUN, 1)
    with Ledger.read(path) as ledger:
        assert [row.kind for row in ledger.rows] == ["opened", "mechanism", "charge"]


def test_the_accounts_are_independent(path: Path):
    with open_ledger(path) as ledger:
        fits = limit().times(limit().nothing(), limit().cost(STEP))
        ledger.charge("training", STEP.times(fits), RUN, 1)
        np.testing.assert_array_equal(ledger.spent("evaluation"), 0.0)
        ledger.charge("evaluation", METRICS, RUN, 1)
        with pytest.raises(BudgetError, match="training records"):
            ledger.charge("training", STEP.times(fits), RUN, 2)
        np.testing.assert_array_equal(ledger.spent("training"), fits * limit().cost(STEP))
        np.testing.assert_array_equal(ledger.spent("evaluation"), limit().cost(METRICS))


@pytest.mark.parametrize("event", [OTHER, NonPrivate(what="x")], ids=lambda event: event.kind)
def test_a_charge_of_no_steps_costs_nothing(path: Path, event: Event):
    with open_ledger(path) as ledger, np.errstate(all="raise"):
        ledger.charge("training", event.times(0), RUN, 1)
        np.testing.assert_array_equal(ledger.spent("training"), 0.0)
        assert ledger.problems() == []


# -- refunds ---------------------------------------------------------------------------------------


def test_a_refund_restores_what_was_spent_to_the_last_bit(path: Path):
    with a_dozen_rows(path) as ledger:
        before = ledger.spent("training")
        charge = ledger.charge("training", OTHER.times(3), RUN, 4)
        assert (ledger.spent("training") > before).any()
        ledger.refund(charge, "deadline")
        np.testing.assert_array_equal(ledger.spent("training"), before)
        assert ledger.rows[-1].facts() == {"charge": charge.number, "cause": "deadline"}
    with Ledger.read(path) as ledger:
        np.testing.assert_array_equal(ledger.spent("training"), before)
        assert ledger.problems() == []


def test_a_refund_makes_room(path: Path):
    with open_ledger(path) as ledger:
        fits = limit().times(limit().nothing(), limit().cost(STEP))
        for round_ in range(3):
            charge = ledger.charge("training", STEP.times(fits), RUN, round_)
            with pytest.raises(BudgetError):
                ledger.charge("training", STEP.times(fits), RUN, round_)
            ledger.refund(charge, "peer")
        assert ledger.problems() == []


def test_a_charge_is_refunded_once(path: Path):
    with open_ledger(path) as ledger:
        charge = ledger.charge("training", STEP, RUN, 1)
        ledger.refund(charge, "peer")
        with pytest.raises(InternalError, match=f"charge {charge.number} .* may not be refunded"):
            ledger.refund(charge, "peer")
        assert [row.kind for row in ledger.rows].count("refund") == 1


def test_what_left_is_not_refunded(path: Path):
    with open_ledger(path) as ledger:
        charge, other = (
            ledger.charge("training", STEP, RUN, 1),
            ledger.charge("training", STEP, RUN, 2),
        )
        ledger.make_final(charge)
        with pytest.raises(InternalError, match="may not be refunded"):
            ledger.refund(charge, "peer")
        ledger.refund(other, "peer")
        np.testing.assert_array_equal(ledger.spent("training"), limit().cost(STEP))


def test_a_charge_from_before_is_not_refunded(path: Path):
    with open_ledger(path) as ledger:
        charge = ledger.charge("training", STEP, RUN, 1)
    with open_ledger(path) as ledger:
        with pytest.raises(InternalError, match="may not be refunded"):
            ledger.refund(charge, "peer")
        with pytest.raises(InternalError, match="may not be refunded"):
            ledger.refund(ledger.rows[0], "peer")
        assert len(ledger.rows) == 3


# -- heads -----------------------------------------------------------------------------------------


def heads_of(path: Path) -> list[Head]:
    """The heads that an honest ledger has had."""
    with Ledger.read(path) as ledger:
        return [Head(ledger.name, row.number, row.hash) for row in ledger.rows]


def test_every_earlier_head_fits(path: Path):
    with a_dozen_rows(path) as ledger:
        assert ledger.head in heads_of(path)
        assert [ledger.compare(head) for head in heads_of(path)] == [None] * 12


def test_the_head_of_another_ledger_says_nothing(path: Path):
    with a_dozen_rows(path) as ledger, a_dozen_rows(path.with_name("other")) as other:
        assert ledger.name != other.name
        assert ledger.compare(other.head) is None
        assert ledger.compare(Head(other.name, 1000, "0" * 64)) is None


def test_a_cut_tail_is_named(path: Path):
    a_dozen_rows(path).close()
    heads = heads_of(path)
    rewrite(path, lambda rows: rows.__delitem__(slice(9, None)))
    with Ledger.read(path) as ledger:
        assert ledger.problems() == []
        assert [ledger.compare(head) for head in heads[:9]] == [None] * 9
        assert (
            ledger.compare(heads[11])
            == "rows 10 to 12 are missing at the end, although its head was shown"
        )
        assert "row 10 is missing" in str(ledger.compare(heads[9]))


def test_a_restored_backup_is_named(path: Path):
    a_dozen_rows(path).close()
    backup = path.read_bytes()
    with open_ledger(path) as ledger:
        ledger.charge("training", STEP.times(3), RUN, 5)
        shown = ledger.head
    path.write_bytes(backup)
    with open_ledger(path) as ledger:
        assert "row 13 is missing" in str(ledger.compare(shown))
        ledger.charge("training", STEP.times(2), RUN, 5)
        assert "row 13 is not the one whose head was shown" in str(ledger.compare(shown))
        ledger.charge("training", STEP.times(2), RUN, 6)
        assert "row 13 is not the one whose head was shown" in str(ledger.compare(shown))


def test_a_rewritten_tail_is_named(path: Path):
    a_dozen_rows(path).close()
    heads = heads_of(path)

    def fewer_steps(rows: list[list[object]]) -> None:
        rows[9][7] = 1

    rewrite(path, fewer_steps)
    with Ledger.read(path) as ledger:
        assert [ledger.compare(head) is None for head in heads] == [True] * 9 + [False] * 3
        assert "row 12 is not the one" in str(ledger.compare(heads[11]))
        assert ledger.compare(Head(ledger.name, 0, "0" * 64)) is not None


def test_a_signed_head_is_of_one_moment_of_one_run():
    one = head_bytes(Head("a", 1, "b"), "c", 2, 3)
    others = [
        (Head("a1", 1, "b"), "c", 2, 3),
        (Head("a", 12, "b"), "c", 2, 3),
        (Head("a", 1, "b1"), "c", 2, 3),
        (Head("a", 1, "b"), "c2", 2, 3),
        (Head("a", 1, "b"), "c", 22, 3),
        (Head("a", 1, "b"), "c", 2, 0),
        (Head('a", 1', 1, "b"), "c", 2, 3),
    ]
    assert len({one, *(head_bytes(*other) for other in others)}) == 8


def test_a_run_has_a_name_of_its_own(path: Path):
    with (
        a_dozen_rows(path) as ledger,
        pytest.raises(PrivflError, match="a run must have a name of its own"),
    ):
        ledger.begin_run(RUN, {})


def test_numbers_survive_to_the_last_bit(path: Path):
    event = Gaussian(noise_multiplier=math.nextafter(20.0, 21.0))
    with open_ledger(path) as ledger:
        ledger.charge("training", event, RUN, 1)
        spent = ledger.spent("training")
    with Ledger.read(path) as ledger:
        np.testing.assert_array_equal(ledger.spent("training"), spent)
        assert list(ledger.events.values()) == [event]


class Interrupted(sqlite3.Connection):
    """A connection that is interrupted, when armed, just after a commit."""

    armed = False

    def execute(self, statement: str, *values: object) -> sqlite3.Cursor:
        done = super().execute(statement, *values)
        if self.armed and statement == "COMMIT":
            raise KeyboardInterrupt
        return done


@pytest.fixture
def interrupted(path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Event], Ledger]:
    """Python runs signal handlers between any two instructions: also between the commit and the
    object's own notes of it. A ledger that this befell when it charged an event for round 1.
    """

    def charged(event: Event) -> Ledger:
        with monkeypatch.context() as patch:
            patch.setattr(
                sqlite3, "connect", functools.partial(sqlite3.connect, factory=Interrupted)
            )
            ledger = open_ledger(path)
        with monkeypatch.context() as patch:
            patch.setattr(Interrupted, "armed", True)
            with pytest.raises(KeyboardInterrupt):
                ledger.charge("training", event, RUN, 1)
        return ledger

    return charged


@pytest.mark.parametrize("event", [STEP, OTHER], ids=["the same", "another"])
def test_a_charge_after_an_interrupted_one(
    path: Path, interrupted: Callable[[Event], Ledger], event: Event
):
    with interrupted(STEP.times(3)) as ledger:
        ledger.charge("training", event.times(2), RUN, 2)
    with Ledger.read(path) as ledger:
        assert [ledger.events[row.mechanism].times(row.steps) for row in ledger.charges()] == [
            STEP.times(3),
            event.times(2),
        ]
        expected = 3 * limit().cost(STEP) + 2 * limit().cost(event)
        np.testing.assert_allclose(ledger.spent("training"), expected, rtol=1e-12)
        assert ledger.problems() == []


def test_an_interrupted_charge_counts_against_the_budget(
    path: Path, interrupted: Callable[[Event], Ledger]
):
    fits = limit().times(limit().nothing(), limit().cost(STEP))
    with interrupted(STEP.times(fits)) as ledger, pytest.raises(BudgetError, match="0 would fit"):
        ledger.charge("training", STEP.times(fits), RUN, 2)
    with Ledger.read(path) as ledger:
        assert ledger.filters["training"].admits(ledger.spent("training"))
        assert ledger.problems() == []
