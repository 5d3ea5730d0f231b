"""The rows of a ledger, and the chain of hashes through them.

One table holds everything. A row is never changed; the hash of each row covers all its columns and
the hash before, so that a changed row, a missing row and an inserted row are detected. A tail that
was cut off is not: for that a ledger's head is shown to others.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from privfl.accounting import Event, event_from_dict
from privfl.errors import DamagedError

Kind = Literal["opened", "run", "mechanism", "charge", "refund"]

CREATE: Final = """
CREATE TABLE rows (
    number INTEGER PRIMARY KEY,
    time TEXT NOT NULL,
    kind TEXT NOT NULL,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    account TEXT NOT NULL,
    mechanism INTEGER NOT NULL,
    steps INTEGER NOT NULL,
    body TEXT NOT NULL,
    hash TEXT NOT NULL
) STRICT
"""
INSERT: Final = "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
SELECT: Final = (
    "SELECT number, time, kind, run, round, account, mechanism, steps, body, hash FROM rows ORDER "
    "BY number"
)
START: Final = "0" * 64


class Row(NamedTuple):
    """One row; its fields are the columns, in their order.

    Attributes:
        number: 1, 2, 3, ...
        time: when it was written, ISO 8601 in UTC.
        kind: what the row says, one of :data:`Kind`.
        run: the run that the row belongs to, in hexadecimal, or empty.
        round: the round of that run, or 0.
        account: 'training' or 'evaluation', whose records the row concerns; or empty.
        mechanism: the number of the row that describes the mechanism; 0 if none.
        steps: how often the mechanism ran.
        body: further facts, as JSON.
        hash: the hash over all other columns and the hash of the row before, in hexadecimal.
    """

    number: int
    time: str
    kind: str
    run: str
    round: int
    account: str
    mechanism: int
    steps: int
    body: str
    hash: str

    @property
    def net_steps(self) -> int:
        """The steps that this row adds to its account; negative for a refund."""
        return -self.steps if self.kind == "refund" else self.steps

    @property
    def debit(self) -> tuple[str, int, str, int, int]:
        """What a charge debits, and its refund takes back: (run, round, account, mechanism,
        steps).
        """
        return self.run, self.round, self.account, self.mechanism, self.steps

    @property
    def hashed(self) -> tuple[Any, ...]:
        """All columns but the hash."""
        return self[:-1]

    def facts(self) -> dict[str, Any]:
        """The body, as values.

        Raises:
            ValueError: If the body is not JSON.
        """
        facts: dict[str, Any] = json.loads(self.body)
        return facts


def chained(before: str, columns: tuple[Any, ...]) -> str:
    """The hash of a row, in hexadecimal.

    Args:
        before: the hash of the row before, or :data:`START`.
        columns: all columns of the row but the hash itself, in their order.
    """
    number, time, kind, run, round_, account, mechanism, steps, body = columns
    # No column but the last may hold a bar, and !r keeps a number apart from a text that reads like
    # it.
    text = (
        f"{before}|{number!r}|{time}|{kind}|{run}|{round_!r}|{account}|{mechanism!r}|{steps!r}"
        f"|{body}"
    )
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def checked(columns: Iterable[tuple[Any, ...]]) -> list[Row]:
    """The rows with these columns, in their order.

    Raises:
        DamagedError: If a row does not fit into the chain; the sentence names the first such row.
    """
    rows: list[Row] = []
    before = START
    for number, values in enumerate(columns, 1):
        row = Row._make(values)
        if row.number != number:
            raise DamagedError(f"row {number} is missing")
        if row.hash != chained(before, row.hashed):
            raise DamagedError(f"row {number} was changed after it was written")
        before = row.hash
        rows.append(row)
    return rows


def pack_vector(vector: NDArray[np.float64]) -> list[float | str]:
    """Divergences of shape (orders,) for JSON, which has no infinity; floats survive to the last
    bit.
    """
    return [value if math.isfinite(value) else "inf" for value in vector.tolist()]


def mechanism_of(row: Row) -> tuple[Event, NDArray[np.float64]]:
    """The event (one step) and its cached divergences, shape (orders,), of a mechanism row.

    Raises:
        DamagedError: If the row does not hold a mechanism that this version knows.
    """
    try:
        facts = row.facts()
        return event_from_dict(facts["event"]), np.array(
            [float(value) for value in facts["divergences"]]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(
            f"row {row.number} describes no mechanism that this version of privfl knows"
        ) from error


def add_steps(steps: dict[int, int], row: Row) -> None:
    """Add what a charge or a refund changes to the steps of an account, by mechanism."""
    steps[row.mechanism] = steps.get(row.mechanism, 0) + row.net_steps


def total(
    steps: Mapping[int, int], vectors: Mapping[int, NDArray[np.float64]], orders: int
) -> NDArray[np.float64]:
    """The divergences of these steps of each mechanism, added up; shape (orders,).

    Args:
        steps: how often each mechanism ran, by the number of its row.
        vectors: the divergences of one step of each, shape (orders,).
        orders: how many Renyi orders there are.
    """
    divergence = np.zeros(orders)
    for mechanism, count in steps.items():
        if count:
            divergence = divergence + count * vectors[mechanism]
    return divergence
