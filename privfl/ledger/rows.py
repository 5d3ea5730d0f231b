"""The rows of a book, and the chain of hashes through them.

One table holds everything. A row is never changed; the hash of each covers all its columns and the
hash before, so that a change, a row taken out and a row put in show. A tail that was cut does not:
for that a book's head is shown to others.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
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
    "SELECT number, time, kind, run, round, account, mechanism, steps, body, hash FROM "
    "rows ORDER BY number"
)
START: Final = "0" * 64


class Row(NamedTuple):
    """One row; its fields are the columns, in their order.

    Attributes:
        number: 1, 2, 3, ...
        time: when it was written, ISO 8601 in UTC.
        kind: what it says: see :data:`Kind`.
        run: the run it belongs to, in hexadecimal, or empty.
        round: of that run, or 0.
        account: 'training' or 'evaluation': whose records it concerns; or empty.
        mechanism: the number of the row that describes the mechanism; 0 if none.
        steps: how often the mechanism ran.
        body: further facts, as JSON.
        hash: over all of this and the hash of the row before.
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
        """Steps that it adds to an account: a refund takes them away."""
        return -self.steps if self.kind == "refund" else self.steps

    def facts(self) -> dict[str, Any]:
        """The body as values."""
        facts: dict[str, Any] = json.loads(self.body)
        return facts


def chained(before: str, columns: tuple[Any, ...]) -> str:
    """The hash of a row with these ``columns`` (all but the hash itself) after one whose hash is
    ``before``; in hexadecimal.
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
        DamagedError: naming the first row that does not fit into the chain.
    """
    found: list[Row] = []
    before = START
    for number, values in enumerate(columns, 1):
        if values[0] != number:
            raise DamagedError(f"row {number} is missing")
        if values[9] != chained(before, values[:9]):
            raise DamagedError(f"row {number} was changed after it was written")
        before = values[9]
        found.append(Row(*values))
    return found


def pack_vector(vector: NDArray[np.float64]) -> list[float | str]:
    """Divergences as JSON, which knows no infinity; floats survive to the last bit."""
    return [value if math.isfinite(value) else "inf" for value in vector.tolist()]


def mechanism_of(row: Row) -> tuple[Event, NDArray[np.float64]]:
    """The event (one step) and the cached divergences that a mechanism row holds.

    Raises:
        DamagedError: the row holds no mechanism that this version knows.
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
