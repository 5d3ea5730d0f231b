"""What a run is, as the row with which it begins says it: written and read here only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from privfl.accounting import Account, Event, account_of, event_from_dict


@dataclass(frozen=True)
class RunFacts:
    """What a reader of a ledger or a report learns about a run.

    Attributes:
        experiment: the digest of the experiment; empty for a training loop of the user's own.
        model: where the model comes from, for a person.
        data: where the records come from, for a person.
        rounds: rounds that were planned; steps in a loop of the user's own.
        noise: whether each site adds all noise itself, or a share of one.
        collusion: how many sites may pool what they see; 0 if noise is not shared.
        delta: the delta at which the run's epsilons are given.
        target_epsilon: the epsilon that was asked for; None if a noise multiplier was.
        private: False if a known seed makes the noise repeatable.
        plans: what the whole run was to be charged, by account.
        exact_metrics: the metrics that leave without noise.
        outside: what data() says that no epsilon covers.
        records_per_person: how many records one person has at most.
        identity: the public identity of this site; empty in a loop of the user's own.
        pinned: whether this site has pinned the identities of all others.
        kept: whether the ledger is kept across runs.
        members: the public identity of every site of the run, by site.
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
        """As the body of a row; JSON."""
        fields = asdict(self) | {
            "plans": {account: event.to_dict() for account, event in self.plans.items()},
            "exact_metrics": list(self.exact_metrics),
            "outside": list(self.outside),
        }
        # A row that says nothing of a coordinator had one: so it was written from the beginning.
        if self.coordinator:
            del fields["coordinator"]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> RunFacts:
        """What :meth:`to_dict` gave; facts that older ledgers do not have get what was true of
        their runs.

        Raises:
            KeyError: If a fact is missing that every version wrote.
            ValueError: If an account or an event is not one of this version's.
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
