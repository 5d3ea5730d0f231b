"""The book itself: what was spent on the training and on the evaluation records of one site, and
what may still be.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from privfl.accounting import ACCOUNTS, ORDERS, Account, Event, RenyiFilter, account_of, divergences
from privfl.errors import BudgetError, DamagedError, InternalError, PrivflError
from privfl.ledger.heads import Head
from privfl.ledger.rows import START, Kind, Row, chained, mechanism_of, pack_vector
from privfl.ledger.storage import Storage

# Why a charge may be taken back. Never an exception, NaN or too little memory: those depend on
# records.
Cause = Literal["deadline", "signal", "peer"]

_FORMAT = 1
# Cached divergences that differ by more than this from new ones were not computed from the event
# beside them.
_TOLERANCE = 1e-9


class _Entry(NamedTuple):
    """What a new row is to say."""

    kind: Kind
    run: str = ""
    round: int = 0
    account: str = ""
    mechanism: int = 0
    steps: int = 0
    body: Mapping[str, Any] = {}


class Ledger:
    """One open book.

    Its first row fixes the site and a filter for each account; without one an account has no limit.

    Attributes:
        site: whose book it is.
        name: random, the same for all copies; in hexadecimal.
        filters: the limits, by account.
        events: the mechanisms, one step of each, by the number of their row.
        rows: everything, in the order in which it was written.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.name, self.site = "", ""
        self.filters: dict[Account, RenyiFilter] = {}
        self.events: dict[int, Event] = {}
        self._numbers: dict[Event, int] = {}
        self._vectors: dict[int, NDArray[np.float64]] = {}
        self._steps: dict[str, dict[int, int]] = {account: {} for account in ACCOUNTS}
        # Charges of this process of which nothing has left yet.
        self._refundable: dict[int, Row] = {}
        self.rows: list[Row] = []
        # Set while a row may be on the disk of which this object does not know yet.
        self._unsure = False
        # What each refund took back.
        self._refunded: set[int] = set()
        try:
            for row in storage.rows():
                self._take(row)
        except BaseException:
            storage.close()
            raise

    @property
    def path(self) -> Path:
        return self._storage.path

    @property
    def orders(self) -> tuple[float, ...]:
        """The Renyi orders of all vectors in this book."""
        return next(iter(self.filters.values())).orders if self.filters else ORDERS

    # -- opening -----------------------------------------------------------------------------------

    @classmethod
    def write(
        cls, path: Path, site: str, filters: Mapping[Account, RenyiFilter], *, network: bool = False
    ) -> Ledger:
        """Open the book at ``path`` as its only writer, or begin one with these ``filters``.

        Raises:
            PrivflError: it cannot be opened, is in use, lies on a network file system, or is
                another site's.
            DamagedError: its rows are not what was written.
        """
        book = cls(Storage.write(path, network=network))
        try:
            if not book.rows:
                body = {
                    "format": _FORMAT,
                    "ledger": os.urandom(16).hex(),
                    "site": site,
                    "filters": {account: found.to_dict() for account, found in filters.items()},
                }
                book._write(_Entry("opened", body=body))
            if book.site != site:
                raise PrivflError(
                    f"the ledger {path} is the book of site {book.site}, not of {site}; name "
                    f"another file"
                )
        except BaseException:
            book.close()
            raise
        return book

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """Open the book at ``path`` for a look.

        Raises:
            PrivflError: it is not there, or holds nothing yet.
            DamagedError: its rows are not what was written.
        """
        book = cls.look(path)
        if book is None:
            raise PrivflError(
                f"the ledger {path} holds nothing yet"
                if path.exists()
                else f"there is no ledger {path}"
            )
        return book

    @classmethod
    def look(cls, path: Path) -> Ledger | None:
        """The same, or None where no book has begun: no file, or one without a row, as a crash
        may leave it.

        Raises:
            PrivflError: it cannot be opened.
            DamagedError: its rows are not what was written.
        """
        if not path.exists():
            return None
        book = cls(Storage.read(path))
        if not book.rows:
            book.close()
            return None
        return book

    def close(self) -> None:
        self._storage.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what it says ------------------------------------------------------------------------------

    @property
    def head(self) -> Head:
        """What stands for all rows so far."""
        self._settle()
        return Head(self.name, len(self.rows), self.rows[-1].hash if self.rows else START)

    def steps(self, account: Account) -> dict[int, int]:
        """Steps charged to ``account`` less those refunded, by the number of their mechanism's
        row.
        """
        return dict(self._steps[account])

    def spent(self, account: Account) -> NDArray[np.float64]:
        """The divergences charged to ``account`` so far; shape (orders of its filter,)."""
        self._settle()
        return self._sum(self._steps[account])

    def vector(self, mechanism: int) -> NDArray[np.float64]:
        """What one step of the mechanism in this row adds; shape (orders,)."""
        return self._vectors[mechanism]

    def charges(self) -> list[Row]:
        """All charges and refunds."""
        return [row for row in self.rows if row.kind in ("charge", "refund")]

    def charged(self, account: Account, run: str, round_: int) -> int:
        """Steps charged to ``account`` for this round, less refunds."""
        steps = 0
        for row in reversed(self.rows):
            if row.run not in (run, ""):
                break
            if (
                row.run == run
                and row.kind in ("charge", "refund")
                and row.account == account
                and row.round == round_
            ):
                steps += row.net_steps
        return steps

    # -- what is done to it ------------------------------------------------------------------------

    def begin_run(self, run: str, facts: Mapping[str, Any]) -> None:
        """Write down that a run begins, and what it is: for the reader of a report."""
        self._settle()
        if any(row.kind == "run" and row.run == run for row in self.rows):
            raise PrivflError(
                f"run {run} stands in the ledger {self.path} already; a run must have a name of "
                f"its own"
            )
        self._write(_Entry("run", run, body=facts))

    def charge(self, account: Account, event: Event, run: str, round_: int) -> Row:
        """Debit ``event``; when this returns the charge is on the disk, and only then its result
        may leave.

        Raises:
            BudgetError: the account's filter does not admit it.
            PrivflError: it cannot be written.
        """
        self._settle()
        limit = self.filters.get(account)
        vector = divergences(event.once(), self.orders)
        if limit is not None and not limit.admits(self.spent(account) + limit.cost(event)):
            raise BudgetError(
                f"the budget of site {self.site} for its {account} records (epsilon "
                f"{limit.epsilon:g} at delta {limit.delta:g}, ledger {self.path}) "
                f"does not admit {event.steps} more {'step' if event.steps == 1 else 'steps'}; "
                f"{limit.times(self.spent(account), vector)} would fit"
            )
        entries = []
        number = self._numbers.get(event.once())
        if number is None:
            number = len(self.rows) + 1
            entries.append(
                _Entry(
                    "mechanism",
                    body={"event": event.once().to_dict(), "divergences": pack_vector(vector)},
                )
            )
        self._write(*entries, _Entry("charge", run, round_, account, number, event.steps))
        self._refundable[self.rows[-1].number] = self.rows[-1]
        return self.rows[-1]

    def make_final(self, charge: Row) -> None:
        """Say that the first byte of what ``charge`` paid for is about to leave: from now on it
        stays.
        """
        self._refundable.pop(charge.number, None)

    def refund(self, charge: Row, cause: Cause) -> None:
        """Take a charge back, in a row of its own.

        The caller has killed the trainer and forgets all that the charged steps changed.

        Raises:
            InternalError: something left already, the charge is of another process, or it was
                refunded before.
        """
        self._settle()
        if self._refundable.pop(charge.number, None) is None:
            raise InternalError(
                f"charge {charge.number} of the ledger {self.path} may not be refunded"
            )
        body = {"charge": charge.number, "cause": cause}
        self._write(
            _Entry(
                "refund",
                charge.run,
                charge.round,
                charge.account,
                charge.mechanism,
                charge.steps,
                body,
            )
        )

    # -- checking ----------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """Everything that a fresh look finds wrong, in sentences: the file, the cached
        divergences, the limits. The chain was checked on opening.
        """
        found = []
        state = self._storage.sound()
        if state != "ok":
            found.append(f"SQLite finds the file damaged: {state}")
        steps: dict[str, dict[int, int]] = {account: {} for account in ACCOUNTS}
        spent = {account: limit.nothing() for account, limit in self.filters.items()}
        for row in self.rows:
            if row.kind == "mechanism":
                event, cached = mechanism_of(row)
                if not np.allclose(
                    cached, divergences(event, self.orders), rtol=_TOLERANCE, atol=0.0
                ):
                    found.append(
                        f"the cached divergences of row {row.number} are not those of its event"
                    )
            elif row.kind in ("charge", "refund"):
                _add_steps(steps[row.account], row)
                account = account_of(row.account)
                if account in spent and row.kind == "refund":
                    spent[account] = self._sum(steps[account])
                elif account in spent:
                    spent[account] = spent[account] + row.steps * self._vectors[row.mechanism]
                    if not self.filters[account].admits(spent[account] / (1.0 + _TOLERANCE)):
                        found.append(f"the charge in row {row.number} is beyond the budget")
        return found

    def compare(self, head: Head) -> str | None:
        """What is wrong with this book if ``head`` was true once; None if it fits, or is another
        book's.
        """
        if head.ledger != self.name:
            return None
        if head.rows > len(self.rows):
            missing = (
                f"row {head.rows} is"
                if head.rows == len(self.rows) + 1
                else f"rows {len(self.rows) + 1} to {head.rows} are"
            )
            return f"{missing} missing at the end, although its head was shown"
        if head.rows < 1 or self.rows[head.rows - 1].hash != head.hash:
            return (
                f"row {head.rows} is not the one whose head was shown: rows were taken back and "
                f"written anew"
            )
        return None

    # -- inside ------------------------------------------------------------------------------------

    def _sum(self, steps: Mapping[int, int]) -> NDArray[np.float64]:
        total = np.zeros(len(self.orders))
        for number, count in steps.items():
            if count:
                total = total + count * self._vectors[number]
        return total

    def _settle(self) -> None:
        """If a signal came between the disk and this object's own notes, what the disk has
        counts.
        """
        if self._unsure:
            for row in self._storage.rows()[len(self.rows) :]:
                self._take(row)
            self._unsure = False

    def _write(self, *entries: _Entry) -> None:
        """Add rows to the file, all or none, and then to what this object knows."""
        rows: list[Row] = []
        for number, entry in enumerate(entries, len(self.rows) + 1):
            before = rows[-1].hash if rows else self.head.hash
            *columns, body = entry
            values: tuple[Any, ...] = (
                number,
                _now(),
                *columns,
                json.dumps(body, sort_keys=True, allow_nan=False),
            )
            rows.append(Row._make((*values, chained(before, values))))
        self._unsure = True
        self._storage.add(rows)
        for row in rows:
            self._take(row)
        self._unsure = False

    def _take(self, row: Row) -> None:
        """What a row that stands in the book means.

        Raises:
            DamagedError: it means nothing, or nothing that this program would have written there.
        """
        try:
            if (row.kind == "opened") != (not self.rows):
                raise ValueError("the beginning of a book is its first row")
            match row.kind:
                case "opened":
                    self._open(row)
                case "mechanism":
                    self._describe(row)
                case "charge" | "refund":
                    self._check_charge(row)
                    _add_steps(self._steps[row.account], row)
                case "run":
                    row.facts()
                case _:
                    raise ValueError("unknown kind")
        except (KeyError, ValueError, TypeError) as error:
            raise DamagedError(
                f"the ledger {self.path} holds a row {row.number} that this version of privfl "
                f"would not have written"
            ) from error
        self.rows.append(row)

    def _describe(self, row: Row) -> None:
        event, vector = mechanism_of(row)
        if len(vector) != len(self.orders):
            raise ValueError("another number of orders")
        self._numbers[event], self._vectors[row.number], self.events[row.number] = (
            row.number,
            vector,
            event,
        )

    def _check_charge(self, row: Row) -> None:
        """A charge is of a mechanism described before; a refund takes back one charge, whole,
        once.
        """
        if row.mechanism not in self._vectors or row.steps < 0:
            raise ValueError("no such mechanism, or negative steps")
        if row.kind == "refund":
            number = int(row.facts()["charge"])
            charge = self.rows[number - 1] if 0 < number < row.number else None
            if (
                charge is None
                or charge.kind != "charge"
                or number in self._refunded
                or charge[3:8] != row[3:8]
            ):
                raise ValueError("not the refund of a charge")
            if any(later.kind == "run" for later in self.rows[number:]):
                raise ValueError("a refund of an earlier run")
            self._refunded.add(number)

    def _open(self, row: Row) -> None:
        facts = row.facts()
        if facts["format"] != _FORMAT:
            raise PrivflError(
                f"the ledger {self.path} was written by another privfl (format {facts['format']}); "
                f"install that one"
            )
        self.name, self.site = str(facts["ledger"]), str(facts["site"])
        if not (self.name.isalnum() and re.fullmatch(r"[\w-]+", self.site)):
            raise ValueError("no names")
        self.filters = {
            account_of(account): RenyiFilter.from_dict(fields)
            for account, fields in facts["filters"].items()
        }
        if len({limit.orders for limit in self.filters.values()}) > 1:
            raise ValueError("accounts with different orders")


def _add_steps(steps: dict[int, int], row: Row) -> None:
    steps[row.mechanism] = steps.get(row.mechanism, 0) + row.net_steps


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
