"""What a report is made from: the charges of one site in the order in which they were made,
whoever wrote them down.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from privfl.accounting import Account as AccountName
from privfl.accounting import Event, RenyiFilter
from privfl.ledger import RunFacts
from privfl.reporting.schema import Check


def now() -> str:
    """The time, as logs and reports give it: ISO 8601 in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class Charged(NamedTuple):
    """One charge, or with negative ``steps`` a refund.

    ``mechanism`` is an index into :attr:`History.mechanisms`.
    """

    time: str
    run: str
    round: int
    account: AccountName
    mechanism: int
    steps: int


@dataclass(frozen=True)
class ReportedRun:
    """A run, as a report is made of it.

    Attributes:
        run: in hexadecimal.
        begun: when it began, as :func:`now` gives it.
        trust: who could see what, in one phrase.
        facts: what the run is.
    """

    run: str
    begun: str
    trust: str
    facts: RunFacts


@dataclass(frozen=True)
class History:
    """One site's history.

    Attributes:
        source: where it was read, for a person.
        kept: whether a ledger is kept across runs.
        limits: the filters of its budget, by account, where they are known.
        mechanisms: each event once, a single step of it.
        vectors: the divergences of one step of each, at ``orders``; shape (orders,).
        filter_epsilons: by account, the epsilons that a site told others after its charges, by a
            filter that they do not know; one for each charge.
    """

    site: str
    source: str
    ledger: str | None
    rows: int | None
    head: str | None
    kept: bool
    limits: dict[AccountName, RenyiFilter]
    orders: tuple[float, ...]
    mechanisms: list[Event]
    vectors: list[NDArray[np.float64]]
    charges: list[Charged]
    runs: list[ReportedRun]
    checks: list[Check] = field(default_factory=list)
    filter_epsilons: dict[AccountName, list[float]] = field(default_factory=dict)
