"""The budget report as one object: terminal, JSON, CSV and HTML all show this and nothing else.

Its JSON schema is what we publish.
"""

from __future__ import annotations

import math
from typing import Annotated, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from privfl.accounting import Account as AccountName

FORMAT: Final = "privfl budget report 1"


def _or_infinite(value: object) -> object:
    # JSON has no infinity.
    return "infinite" if isinstance(value, float) and math.isinf(value) else value


# An epsilon; "infinite" where nothing bounds what was released.
Epsilon = Annotated[float | Literal["infinite"], BeforeValidator(_or_infinite)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Check(_Part):
    """Something that was verified: the chain of a ledger, its heads, the signatures under them.

    ``ok`` is null if it could not be.
    """

    what: str
    ok: bool | None
    detail: str


class Budget(_Part):
    """What the owner of the records allows in all runs together."""

    epsilon: float
    delta: float


class Person(_Part):
    """What holds for a person with so many records, all at this site."""

    records: int
    epsilon: Epsilon
    delta: float


class Cost(_Part):
    """What one run did to one kind of record, and what that costs by each accountant.

    ``rdp`` and ``pld`` are those of the whole plan, fixed in advance, also if the run ended early;
    ``filter`` is that of the ``steps`` charged, and holds for a run chosen after a look at earlier
    results. Null where there is none. ``epsilon`` is that of the accountant that admitted the run.
    ``noise_multiplier`` is what the plan says: in units of the clipping norm, or for metrics of
    what one record can change. Of discrete noise no ``pld`` is known that is a bound; it is then
    the ``rdp``.
    """

    mechanism: str
    sampling_rate: float
    noise_multiplier: float
    steps: int
    delta: float
    accountant: Literal["rdp", "filter"]
    epsilon: Epsilon
    rdp: Epsilon
    pld: Epsilon | None
    filter: Epsilon | None
    person: Person | None


class Adversary(_Part):
    """Someone who wants to learn about a training record of this site; ``epsilon`` is null where
    another protection than noise holds.
    """

    who: str
    sees: str
    epsilon: Epsilon | None
    because: str


class Run(_Part):
    """One run, as far as it was charged."""

    run: str
    begun: str
    model: str
    data: str
    members: list[str]
    rounds_planned: int
    rounds_charged: int
    trust: str
    private: bool
    exact_metrics: list[str]
    outside: list[str]
    training: Cost | None
    evaluation: Cost | None
    adversaries: list[Adversary]


class Charge(_Part):
    """All charges of one run for the same mechanism; ``rounds`` as in '1-5, 7', ``refunded``
    steps are not in ``steps``.

    A run with very many mechanisms has one line, with the least and the most noise among its
    ``mechanisms``.
    """

    run: str
    rounds: str
    first: str
    last: str
    kind: str
    sampling_rate: float
    noise_multiplier: float
    most_noise: float
    mechanisms: int
    steps: int
    refunded: int


class Point(_Part):
    """Epsilon spent after a charge: ``charge`` counts them from 1."""

    charge: int
    time: str
    run: str
    round: int
    epsilon: Epsilon


class Account(_Part):
    """All that concerns one kind of record: ``spent`` over all runs, by ``accountant``;
    ``curve`` is thinned out to some hundred points.
    """

    account: AccountName
    accountant: Literal["rdp", "filter"]
    delta: float
    spent: Epsilon
    person: Person | None
    charges: list[Charge]
    curve: list[Point]


class SiteReport(_Part):
    """One site's spending.

    ``kept`` is false where the book covers a single run; ``rows`` and ``head`` are those of its
    ledger, if it is one.
    """

    site: str
    source: str
    kept: bool
    ledger: str | None
    rows: int | None
    head: str | None
    budget: Budget | None
    checks: list[Check]
    accounts: list[Account]
    runs: list[Run]


class Report(_Part):
    """A budget report."""

    format: Literal["privfl budget report 1"]
    made: str
    version: str
    title: str
    unit: str
    adjacency: str
    sampling: str
    sites: list[SiteReport]

    @property
    def sound(self) -> bool:
        """Whether nothing that was checked is wrong."""
        return all(check.ok is not False for site in self.sites for check in site.checks)
