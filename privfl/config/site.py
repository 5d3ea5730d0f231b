"""The site file: what one site keeps to itself, and the law of its data owner, which no
experiment can overrule.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from privfl.config.values import (
    Count,
    Device,
    MetricName,
    Options,
    Positive,
    Probability,
    PublicKey,
    Section,
    SiteName,
)

Protection = Literal["encryption", "masks", "pinned_keys"]


class LedgerFile(Section):
    """Where the book of this site's records lies, counted from the site file;
    ``network_file_system: true`` takes the risk of a shared disk.
    """

    file: str
    network_file_system: bool = False


class Budget(Section):
    """What may be spent on a record in all runs together."""

    epsilon: Positive
    delta: Probability


def _file_alone(value: Any) -> Any:
    return {"file": value} if isinstance(value, str) else value


class SiteFile(Section):
    """``DIR/<site>.yaml`` of ``--sites DIR``. Relative paths count from the folder of the file.

    ``data_options`` go over those of the experiment, key by key; ``output`` is the folder for this
    site's model, ``log`` its log file. ``identity`` is the file with this site's private key
    (`privfl keys generate`), ``peers`` are the public keys of the other sites, without which one of
    them could be somebody else.

    The policy: ``ledger`` and ``budget``; the ``least_noise_multiplier``, ``least_sites`` and
    ``least_collusion`` (how many other sites may pool what they see, also with the coordinator, and
    still see only sums over two sites or more) that a run must have; the protections it must
    ``require``; ``attempts``, the most contributions to one sum; ``metrics``, the names of those
    that may leave (if absent: any with noise); ``exact_metrics``, the names of those that may leave
    without noise where the experiment calls the records public (if absent: none if this file has a
    rule about noise, metrics or a budget, else any). ``records_per_person`` is for the report.
    """

    data_options: Options = {}
    device: Device = "cpu"
    output: str | None = None
    log: str | None = None
    identity: str | None = None
    peers: dict[SiteName, PublicKey] = {}
    ledger: Annotated[LedgerFile, BeforeValidator(_file_alone)] | None = None
    budget: Budget | None = None
    least_noise_multiplier: Positive | None = None
    least_sites: Count = 2
    least_collusion: Annotated[int, Field(ge=0)] = 0
    require: tuple[Protection, ...] = ()
    attempts: Count = 3
    records_per_person: Count = 1
    metrics: tuple[MetricName, ...] | None = None
    exact_metrics: tuple[MetricName, ...] | None = None

    @model_validator(mode="after")
    def _peers_need_more(self) -> SiteFile:
        if self.peers and self.identity is None:
            raise ValueError(
                "has peers but no identity, by which they would know this site; make one with "
                "`privfl keys generate`"
            )
        if self.peers and self.output is None:
            raise ValueError(
                "has peers but no output: model and log would go into the folder of a coordinator "
                "that need not be trusted"
            )
        return self

    @model_validator(mode="after")
    def _a_budget_needs_a_book(self) -> SiteFile:
        if (self.ledger is None) != (self.budget is None):
            there, missing = ("budget", "ledger") if self.ledger is None else ("ledger", "budget")
            raise ValueError(
                f"has {there} but no {missing}: a budget over all runs is kept in a ledger; add "
                f"both or none, as in "
                "ledger: PATH and budget: {epsilon: 2, delta: 1.0e-5}"
            )
        return self
