"""The budget report as one object: terminal, JSON, CSV and HTML all show this and nothing else.

Its JSON schema is published (`privfl budget export --schema`), descriptions included.
"""

from __future__ import annotations

import math
from typing import Annotated, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from privfl.accounting import Account as AccountName

FORMAT: Final = "privfl budget report 2"


def _or_infinite(value: object) -> object:
    # JSON has no infinity.
    return "infinite" if isinstance(value, float) and math.isinf(value) else value


# An epsilon; "infinite" where nothing bounds what was released.
Epsilon = Annotated[float | Literal["infinite"], BeforeValidator(_or_infinite)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Check(_Part):
    """Something that was verified."""

    what: str = Field(
        description="What was verified: `chain` (the hashes of the ledger's rows), `heads` (the "
        "signed heads that were shown to others), or `ledger`."
    )
    ok: bool | None = Field(
        description="True if it holds, false if it does not, null if it could not be checked."
    )
    detail: str = Field(description="What was found, in plain words.")


class Budget(_Part):
    """What the owner of the records allows in all runs together."""

    epsilon: float = Field(
        description="Upper bound on the epsilon of a record over all runs, for each kind of record."
    )
    delta: float = Field(description="Delta at which that bound holds.")


class Person(_Part):
    """What holds for a person with several records, all of them at this site."""

    records: int = Field(description="Number of records of that person.")
    epsilon: Epsilon = Field(
        description="Upper bound on the epsilon of that person; `infinite` where none is known."
    )
    delta: float = Field(description="Delta at which that epsilon holds.")


class Cost(_Part):
    """What one run did to one kind of record, and what that costs by each accountant.

    An epsilon is null where that accountant gives none.
    """

    mechanism: str = Field(description="Kind of the mechanism that the run planned.")
    sampling_rate: float = Field(
        description="Planned probability with which a record takes part in a step."
    )
    noise_multiplier: float = Field(
        description="Planned standard deviation of the noise of a step: of training in units of "
        "the clipping norm, of metrics in units of what one record can change."
    )
    steps: int = Field(
        description="Steps that were charged, less refunds: of DP-SGD, or releases of metrics."
    )
    delta: float = Field(description="Delta at which the epsilons hold.")
    accountant: Literal["rdp", "filter"] = Field(
        description="The accountant that admitted the run: `filter` where the ledger has a budget "
        "for all runs, else `rdp`."
    )
    epsilon: Epsilon = Field(description="Epsilon of the run by that accountant.")
    rdp: Epsilon = Field(
        description="Epsilon of the whole plan, fixed in advance, by Renyi divergences, also if "
        "the run ended early."
    )
    pld: Epsilon | None = Field(
        description="Epsilon of the whole plan, fixed in advance, by privacy loss distributions, "
        "also if the run ended early. For discrete noise no such bound is known, and it is that "
        "of `rdp`. Null for older runs and for runs with many mechanisms."
    )
    filter: Epsilon | None = Field(
        description="Epsilon of the charged `steps` by the filter of the ledger, which also holds "
        "for a run that was chosen after a look at earlier results. Null if there is no budget "
        "for all runs."
    )
    person: Person | None = Field(
        description="What the run costs a person with as many records as the site file says; "
        "null if that is one, or if no bound was computed."
    )


class Adversary(_Part):
    """Somebody who wants to learn about a training record of this site."""

    who: str = Field(description="Who that is.")
    sees: str = Field(description="What that adversary sees of the run.")
    epsilon: Epsilon | None = Field(
        description="Upper bound on the epsilon that holds against that adversary; null where "
        "another protection than noise holds, or none."
    )
    because: str = Field(description="What protects the record, and why.")


class Run(_Part):
    """One run, as far as it was charged."""

    run: str = Field(description="Identifier of the run.")
    begun: str = Field(description="Time at which the run began, ISO 8601 in UTC.")
    model: str = Field(description="Function that made the model.")
    data: str = Field(description="Function that read the records.")
    members: list[str] = Field(description="Names of all sites of the run.")
    rounds_planned: int = Field(description="Rounds that the experiment asked for.")
    rounds_charged: int = Field(
        description="Rounds that were charged to training records; fewer if the run ended early."
    )
    trust: str = Field(
        description="Whether the keys of the other sites were pinned, and whether the parties "
        "form a single trust domain."
    )
    private: bool = Field(
        description="False if the noise came from a known seed, so that nothing is protected."
    )
    exact_metrics: list[str] = Field(description="Names of the metrics that left without noise.")
    outside: list[str] = Field(
        description="What the function that read the records says is covered by no epsilon."
    )
    training: Cost | None = Field(
        description="Cost for training records; null if nothing was charged to them."
    )
    evaluation: Cost | None = Field(
        description="Cost for evaluation records; null if nothing was charged to them."
    )
    adversaries: list[Adversary] = Field(
        description="Who could learn what about a training record; empty if none was "
        "charged, or for a site alone."
    )


class Charge(_Part):
    """All charges of one run for the same mechanism.

    A run with very many mechanisms has a single one of these for all of them.
    """

    run: str = Field(description="Identifier of the run.")
    rounds: str = Field(description="Numbers of the rounds that were charged, as in '1-5, 7'.")
    first: str = Field(description="Time of the first charge, ISO 8601 in UTC.")
    last: str = Field(description="Time of the last charge, ISO 8601 in UTC.")
    kind: str = Field(description="Kinds of the mechanisms, separated by commas.")
    sampling_rate: float = Field(description="The largest sampling rate among the mechanisms.")
    noise_multiplier: float = Field(description="The least noise multiplier among the mechanisms.")
    most_noise: float = Field(description="The largest noise multiplier among the mechanisms.")
    mechanisms: int = Field(description="Number of different mechanisms.")
    steps: int = Field(description="Steps that were charged, less those that were refunded.")
    refunded: int = Field(
        description="Steps that were refunded, because provably nothing had left the site."
    )


class Point(_Part):
    """Epsilon spent after one charge."""

    charge: int = Field(description="Number of the charge, counted from 1.")
    time: str = Field(description="Time of the charge, ISO 8601 in UTC.")
    run: str = Field(description="Identifier of the run.")
    round: int = Field(description="Round of that run; 0 for a charge at its beginning.")
    epsilon: Epsilon = Field(description="Epsilon spent over all runs up to and with this charge.")


class Account(_Part):
    """All that concerns one kind of record, over all runs of this report."""

    account: AccountName = Field(description="The kind of record.")
    accountant: Literal["rdp", "filter"] = Field(
        description="The accountant of `spent` and `curve`: `filter` where the ledger has a "
        "budget for all runs, else `rdp`."
    )
    delta: float = Field(description="Delta at which the epsilons hold.")
    spent: Epsilon = Field(description="Epsilon spent over all runs.")
    person: Person | None = Field(
        description="What holds for a person with several records over all runs, by basic "
        "composition; null unless it is known for every run, for the same number of records."
    )
    charges: list[Charge] = Field(description="What was charged, grouped by run and mechanism.")
    curve: list[Point] = Field(
        description="Epsilon over time, thinned out to at most some hundred points."
    )


class SiteReport(_Part):
    """The spending of one site."""

    site: str = Field(description="Name of the site.")
    source: str = Field(description="File from which the spending was read.")
    kept: bool = Field(
        description="Whether a ledger is kept across runs; if not, earlier runs are not in here."
    )
    ledger: str | None = Field(description="Identifier of the ledger; null if it is not known.")
    rows: int | None = Field(description="Number of rows of the ledger; null if it is not known.")
    head: str | None = Field(
        description="Hash of the last row of the ledger, in hexadecimal; null if it is not known."
    )
    budget: Budget | None = Field(
        description="What the owner of the records allows in all runs together; null if there is "
        "no budget or it is not known here."
    )
    checks: list[Check] = Field(description="What was verified.")
    accounts: list[Account] = Field(description="What was spent, by kind of record.")
    runs: list[Run] = Field(description="All runs, in the order in which they began.")


class Report(_Part):
    """A budget report of privfl: what was spent on the records of one or more sites."""

    format: Literal["privfl budget report 2"] = Field(
        description="Name and version of this format."
    )
    made: str = Field(description="Time at which the report was made, ISO 8601 in UTC.")
    version: str = Field(description="Version of privfl that made the report.")
    title: str = Field(description="Title of the report.")
    unit: str = Field(description="What an epsilon is about, where nothing else is said.")
    adjacency: str = Field(description="Which pairs of data sets the guarantee compares.")
    sampling: str = Field(description="How records are chosen for a step.")
    sites: list[SiteReport] = Field(description="The spending of each site.")

    @property
    def sound(self) -> bool:
        """Whether nothing that was checked is wrong."""
        return all(check.ok is not False for site in self.sites for check in site.checks)
