"""What a report is made from: the charges of one site in the order in which they were made,
whoever wrote them down.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from privfl.accounting import Account as AccountName
from privfl.accounting import Event, RenyiFilter
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
class RunFacts:
    """What is known of a run.

    ``plans``: by account, what was to be charged; ``trust``: who could see what, in one phrase;
    ``outside``: what data() says that no epsilon covers; ``coordinator``: whether one took part
    that is no site.
    """

    run: str
    begun: str
    model: str
    data: str
    members: tuple[str, ...]
    noise: Literal["site", "distributed"]
    collusion: int
    rounds: int
    delta: float
    private: bool
    trust: str
    exact_metrics: tuple[str, ...]
    outside: tuple[str, ...]
    records_per_person: int
    coordinator: bool
    plans: dict[AccountName, Event]


@dataclass(frozen=True)
class History:
    """One site's history.

    Attributes: source: where it was read, for a person. kept: whether a book is kept across runs.
        limits: the filters of its budget, by account, where they are known. mechanisms: each event
        once, a single step of it. vectors: the divergences of one step of each, at ``orders``;
        shape (orders,). told: by account, the epsilons that a site told others after its charges,
        by a filter that they do not know; one for each charge.
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
    runs: list[RunFacts]
    checks: list[Check] = field(default_factory=list)
    told: dict[AccountName, list[float]] = field(default_factory=dict)
