"""The ledger itself: what was spent on the training and on the evaluation records of one site, and
what may still be spent.
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
from privfl.ledger.checks import cost_problems, head_problem
from privfl.ledger.heads import Head
from privfl.ledger.rows import (
    START,
    Kind,
    Row,
    add_steps,
    chained,
    mechanism_of,
    pack_vector,
    total,
)
from privfl.ledger.storage import Storage

# Why a charge may be taken back. Never an exception, NaN or too little memory: those depend on
# records.
Cause = Literal["deadline", "signal", "peer"]

_FORMAT = 1


class _Entry(NamedTuple):
    """What is to be written as a new row: its columns but for number, time and hash."""

    kind: Kind
    run: str = ""
    round: int = 0
    account: str = ""
    mechanism: int = 0
    steps: int = 0
    body: Mapping[str, Any] = {}


class Ledger:
    """One open ledger. Open it with :meth:`write`, :meth:`read` or :meth:`look`.

    Its first row fixes the site and a filter for each account; an account without a filter has no
    limit.

    Guarantee: A charge is on the disk when :meth:`charge` returns, and never beyond the filter of
        its account. Whoever releases a result only after that has paid for it, whatever ends the
        process or the machine. It holds for the disks that :class:`Storage` accepts.

    Attributes:
        site: the site whose records the ledger is about.
        name: random, in hexadecimal; the same for all copies of the ledger.
        filters: the limits, by account.
        events: the mechanisms, one step of each, by the number of their row.
        rows: all rows, in the order in which they were written.

    Raises:
        DamagedError: If the rows are not what was written.
        PrivflError: If the file cannot be read.
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
        """The Renyi orders of all vectors in this ledger."""
        return next(iter(self.filters.values())).orders if self.filters else ORDERS

    # -- opening -----------------------------------------------------------------------------------

    @classmethod
    def write(
        cls, path: Path, site: str, filters: Mapping[Account, RenyiFilter], *, network: bool = False
    ) -> Ledger:
        """Open the ledger at ``path`` as its only writer, or begin one.

        Args:
            path: the file; it is made if it does not exist.
            site: the site whose ledger it must be.
            filters: the limits of a ledger that begins now; those of an older one stay.
            network: whether a file system that is shared between machines is allowed.

        Raises:
            PrivflError: If the file cannot be opened, is in use, lies on a network file system, or
                belongs to another site.
            DamagedError: If the rows are not what was written.
        """
        ledger = cls(Storage.write(path, network=network))
        try:
            if not ledger.rows:
                body = {
                    "format": _FORMAT,
                    "ledger": os.urandom(16).hex(),
                    "site": site,
                    "filters": {account: limit.to_dict() for account, limit in filters.items()},
                }
                ledger._write(_Entry("opened", body=body))
            if ledger.site != site:
                raise PrivflError(
                    f"the ledger {path} belongs to site {ledger.site}, not to {site}; name another "
                    "file"
                )
        except BaseException:
            ledger.close()
            raise
        return ledger

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """Open the ledger at ``path`` for reading; a running writer is not disturbed.

        Raises:
            PrivflError: If the file does not exist, cannot be opened, or holds no row yet.
            DamagedError: If the rows are not what was written.
        """
        ledger = cls.look(path)
        if ledger is None:
            raise PrivflError(
                f"the ledger {path} holds nothing yet"
                if path.exists()
                else f"there is no ledger {path}"
            )
        return ledger

    @classmethod
    def look(cls, path: Path) -> Ledger | None:
        """Open the ledger at ``path`` for reading, if one has begun there.

        Returns:
            The ledger; None if there is no file, or one without a row, as a crash may leave it.

        Raises:
            PrivflError: If the file cannot be opened.
            DamagedError: If the rows are not what was written.
        """
        if not path.exists():
            return None
        ledger = cls(Storage.read(path))
        if not ledger.rows:
            ledger.close()
            return None
        return ledger

    def close(self) -> None:
        """Close the file and let others write."""
        self._storage.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what it says ------------------------------------------------------------------------------

    @property
    def head(self) -> Head:
        """The head after all rows so far."""
        self._settle()
        return Head(self.name, len(self.rows), self.rows[-1].hash if self.rows else START)

    def steps(self, account: Account) -> dict[int, int]:
        """Steps charged to ``account``, less those refunded, by the number of their mechanism's
        row.
        """
        return dict(self._steps[account])

    def spent(self, account: Account) -> NDArray[np.float64]:
        """The divergences charged to ``account`` so far, less those refunded; shape (orders,)."""
        self._settle()
        return total(self._steps[account], self._vectors, len(self.orders))

    def vector(self, mechanism: int) -> NDArray[np.float64]:
        """The divergences of one step of the mechanism in this row; shape (orders,)."""
        return self._vectors[mechanism]

    def charges(self) -> list[Row]:
        """All charges and refunds, in their order."""
        return [row for row in self.rows if row.kind in ("charge", "refund")]

    def charged(self, account: Account, run: str, round_: int) -> int:
        """Steps charged to ``account`` for this round of this run, less those refunded."""
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
        """Write down that a run begins, and its facts, for reports.

        Args:
            run: the run, in hexadecimal.
            facts: what :meth:`RunFacts.to_dict` gives.

        Raises:
            PrivflError: If the ledger has a run of this name already, or cannot be written.
        """
        self._settle()
        if any(row.kind == "run" and row.run == run for row in self.rows):
            raise PrivflError(
                f"the ledger {self.path} has a run {run} already; a run must have a name of its own"
            )
        self._write(_Entry("run", run, body=facts))

    def charge(self, account: Account, event: Event, run: str, round_: int) -> Row:
        """Debit ``event`` from ``account``.

        Guarantee: When this returns, the charge is on the disk. Only then may its result leave.

        Args:
            account: whose records the event concerns.
            event: the mechanism, with all its steps.
            run: the run, in hexadecimal.
            round_: the round of that run.

        Returns:
            The row of the charge.

        Raises:
            BudgetError: If the account's filter does not admit the charge; nothing was written.
            PrivflError: If the charge cannot be written.
        """
        self._settle()
        limit = self.filters.get(account)
        vector = divergences(event.once(), self.orders)
        if limit is not None and not limit.admits(self.spent(account) + limit.cost(event)):
            raise BudgetError(
                f"the budget of site {self.site} for its {account} records (epsilon "
                f"{limit.epsilon:g} at delta {limit.delta:g}, ledger {self.path}) does not admit "
                f"{event.steps} more {'step' if event.steps == 1 else 'steps'}; "
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
        """Make a charge final, because the first byte of what it paid for is about to leave: from
        now on it cannot be refunded.
        """
        self._refundable.pop(charge.number, None)

    def refund(self, charge: Row, cause: Cause) -> None:
        """Take a charge back, in a row of its own.

        The caller must have killed the trainer, and must forget all that the charged steps changed.

        Raises:
            InternalError: If the charge was made final, was made by another process, or was
                refunded before.
            PrivflError: If the refund cannot be written.
        """
        self._settle()
        if self._refundable.pop(charge.number, None) is None:
            raise InternalError(
                f"charge {charge.number} of the ledger {self.path} may not be refunded"
            )
        body = {"charge": charge.number, "cause": cause}
        self._write(_Entry("refund", *charge.debit, body))

    # -- checking ----------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """What is wrong with the file, the cached divergences and the limits, each in a sentence.

        All of it is computed anew. The chain of hashes was checked on opening.
        """
        state = self._storage.sound()
        damage = [] if state == "ok" else [f"SQLite finds the file damaged: {state}"]
        return damage + cost_problems(self.rows, self.filters, self.orders)

    def compare(self, head: Head) -> str | None:
        """What is wrong with this ledger if it once had this ``head``, in a sentence.

        Returns:
            None if the head fits, or is the head of another ledger.
        """
        return head_problem(self.rows, head) if head.ledger == self.name else None

    # -- inside ------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Read what this object does not know of: if a signal came between the writing of a row
        and this object's own notes, the disk has the last word.
        """
        if self._unsure:
            for row in self._storage.rows()[len(self.rows) :]:
                self._take(row)
            self._unsure = False

    def _write(self, *entries: _Entry) -> None:
        """Add rows to the file, all or none, and then to what this object knows.

        Raises:
            PrivflError: If the rows cannot be written; then none was added.
        """
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
        """Take note of what a row of the file means.

        Raises:
            DamagedError: If this program would not have written such a row there.
        """
        try:
            if (row.kind == "opened") != (not self.rows):
                raise ValueError("the beginning of a ledger is its first row")
            match row.kind:
                case "opened":
                    self._open(row)
                case "mechanism":
                    self._describe(row)
                case "charge" | "refund":
                    self._check_charge(row)
                    add_steps(self._steps[row.account], row)
                case "run":
                    row.facts()
                case _:
                    raise ValueError("unknown kind")
        except (KeyError, ValueError, TypeError) as error:
            raise DamagedError(
                f"the ledger {self.path} holds a row {row.number} that this version of privfl "
                "would not have written"
            ) from error
        self.rows.append(row)

    def _describe(self, row: Row) -> None:
        event, vector = mechanism_of(row)
        if len(vector) != len(self.orders):
            raise ValueError("another number of orders")
        self._numbers[event] = row.number
        self._vectors[row.number], self.events[row.number] = vector, event

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
                or charge.debit != row.debit
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
                "install that one"
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


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
