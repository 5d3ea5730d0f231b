"""The facts of a run, as the first row of the run holds them: written and read here only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from privfl.accounting import Account, Event, account_of, event_from_dict


@dataclass(frozen=True)
class RunFacts:
    """What a reader of a ledger or a report learns about a run.

    Attributes:
        experiment: the digest of the experiment; empty for a user's own training loop.
        model: where the model comes from, for a person.
        data: where the records come from, for a person.
        rounds: how many rounds were planned; steps in a user's own loop.
        noise: whether each site adds all noise itself, or a share of one noise.
        collusion: how many sites may pool what they see; 0 if noise is not shared.
        delta: the delta at which the run's epsilons are given.
        target_epsilon: the epsilon that was asked for; None if a noise multiplier was.
        private: False if a known seed makes the noise repeatable.
        plans: all that was to be charged in the whole run, by account.
        exact_metrics: the metrics that leave without noise.
        outside: what data() says that no epsilon covers.
        records_per_person: how many records one person has at most.
        identity: the public identity of this site; empty in a user's own loop.
        pinned: whether this site has pinned the identities of all others.
        kept: whether the ledger is kept across runs.
        members: the public identity of every site of the run, by site; empty texts in a user's own
            loop.
        coordinator: whether a coordinator that is no site took part.
    """

    experiment: str
    model: str
    data: str
    rounds: int
    noise: Literal["site", "distributed"]
    collusion: int
    delta: float
    target_epsilon: float | None
    private: bool
    plans: dict[Account, Event]
    exact_metrics: tuple[str, ...]
    outside: tuple[str, ...]
    records_per_person: int
    identity: str
    pinned: bool
    kept: bool
    members: dict[str, str]
    coordinator: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The facts as the body of a row, in JSON-ready values."""
        fields = asdict(self) | {
            "plans": {account: event.to_dict() for account, event in self.plans.items()},
            "exact_metrics": list(self.exact_metrics),
            "outside": list(self.outside),
        }
        # A row without this fact is of a run with a coordinator: the first versions wrote no other.
        if self.coordinator:
            del fields["coordinator"]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> RunFacts:
        """The facts that :meth:`to_dict` wrote. Facts that an older ledger lacks get the value that
        was true of all runs of that time.

        Raises:
            KeyError: If a fact is missing that every version wrote.
            ValueError: If this version does not know an account or an event.
        """
        return cls(
            experiment=fields["experiment"],
            model=fields["model"],
            data=fields["data"],
            rounds=fields["rounds"],
            noise=fields["noise"],
            collusion=fields.get("collusion", 0),
            delta=fields["delta"],
            target_epsilon=fields["target_epsilon"],
            private=fields["private"],
            plans={
                account_of(account): event_from_dict(event)
                for account, event in fields["plans"].items()
            },
            exact_metrics=tuple(fields["exact_metrics"]),
            outside=tuple(fields.get("outside", ())),
            records_per_person=fields["records_per_person"],
            identity=fields.get("identity", ""),
            pinned=fields["pinned"],
            kept=fields["kept"],
            members=dict(fields["members"]),
            coordinator=fields.get("coordinator", True),
        )
