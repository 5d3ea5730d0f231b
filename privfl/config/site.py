"""The site file: what one site keeps to itself, and the policy of its data owner.

No experiment can overrule the policy. Docstrings of sections and descriptions of fields are the
reference of the keys, from which docs/reference/site-keys.md is generated.
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
    """Where the ledger lies. A path alone is taken as `file`."""

    file: str = Field(
        description="Path of the ledger, on a local disk. It is made by the first run."
    )
    network_file_system: bool = Field(
        default=False,
        description="Whether the ledger may lie on a network file system, whose locks may fail. "
        "By default such a place is refused.",
    )


class Budget(Section):
    """The limits of the ledger. They cannot be changed once it has begun."""

    epsilon: Positive = Field(
        description="Upper bound on the epsilon of a record over all runs with this ledger, "
        "for training records and for evaluation records each."
    )
    delta: Probability = Field(
        description="Delta at which that bound holds. "
        "An experiment with a larger `privacy.delta` is refused."
    )


def _file_alone(value: Any) -> Any:
    return {"file": value} if isinstance(value, str) else value


class SiteFile(Section):
    """`sites/<site>.yaml` beside the experiment, or `DIR/<site>.yaml` of `--sites DIR`, read on the
    machine of that site only.

    Relative paths count from the folder of this file, except those in `data_options`, which start
    where the command is typed.

    The keys from `ledger` on are the policy of the data owner, which no experiment can overrule:
    a run that breaks it is refused before a record is read.
    With any of them, or with `peers`, a run with `insecure_test_seed` is refused too.
    """

    data_options: Options = Field(
        default={},
        description="Keyword arguments of `data` at this site. "
        "They override those of the experiment, key by key.",
    )
    device: Device = Field(
        default="cpu", description="Device of torch on which this site trains and evaluates."
    )
    output: str | None = Field(
        default=None,
        description="Folder for this site's model and for what it keeps of its runs. "
        "By default it is `sites/NAME` in the run folder, which is the coordinator's.",
    )
    log: str | None = Field(
        default=None,
        description="Log file of this site. It may quote records and is readable for its owner "
        "only. By default it is `site.log` in `output`.",
    )
    identity: str | None = Field(
        default=None,
        description="File with this site's private key, as `privfl keys generate` writes it. "
        "By default the site has a new key in every run, which no other site can know beforehand.",
    )
    peers: dict[SiteName, PublicKey] = Field(
        default={},
        description="Public keys of the other sites, as `privfl keys show` prints them there. "
        "A run with another key for one of them, or with a site that is missing here, is refused. "
        "Without them a site could be somebody else. "
        "They need `identity` and `output`.",
    )
    ledger: Annotated[LedgerFile, BeforeValidator(_file_alone)] | None = Field(
        default=None,
        description="Ledger of everything spent on this site's records in all runs: a path, or a "
        "section with these keys. It needs `budget`. "
        "By default a run keeps a ledger of its own and knows nothing of earlier runs.",
    )
    budget: Budget | None = Field(
        default=None,
        description="What may be spent on a record in all runs together. "
        "A run whose plan does not fit into what is left is refused before a record is read. "
        "It needs `ledger`.",
    )
    least_noise_multiplier: Positive | None = Field(
        default=None,
        description="Refuse a run with a smaller noise multiplier, "
        "of training steps or of metrics with noise. By default any will do.",
    )
    least_sites: Count = Field(default=2, description="Refuse a run of fewer sites.")
    least_collusion: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="How many other sites may pool what they see, also with the coordinator, and "
        "still see only sums over two sites or more. "
        "A run with fewer than this plus two sites is refused, "
        "and with distributed noise a run with a smaller `privacy.collusion`.",
    )
    require: tuple[Protection, ...] = Field(
        default=(),
        description="Protections without which nothing is sent. "
        "`encryption` and `masks` are always required. "
        "`pinned_keys` refuses every run for which `peers` does not have the keys of all other "
        "sites.",
    )
    attempts: Count = Field(
        default=3, description="The most contributions that this site makes to one sum."
    )
    records_per_person: Count = Field(
        default=1,
        description="How many records of this site one person may have. "
        "It changes no noise: plan and report then also give the epsilon of such a person.",
    )
    metrics: tuple[MetricName, ...] | None = Field(
        default=None,
        description="Names of the metrics that may leave this site. "
        "A run with others is refused. By default any may leave with noise.",
    )
    exact_metrics: tuple[MetricName, ...] | None = Field(
        default=None,
        description="Names of the metrics that may leave without noise, where the experiment says "
        "`evaluation.records: public`. "
        "By default none may if this file has `budget`, `ledger`, `least_noise_multiplier` or "
        "`metrics`, and any may if it has none of them.",
    )

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
    def _a_budget_needs_a_ledger(self) -> SiteFile:
        if (self.ledger is None) != (self.budget is None):
            given, missing = ("budget", "ledger") if self.ledger is None else ("ledger", "budget")
            raise ValueError(
                f"has {given} but no {missing}: a budget over all runs is kept in a ledger; add "
                "both or none, as in ledger: PATH and budget: {epsilon: 2, delta: 1.0e-5}"
            )
        return self
