"""What rank 0 reports of a run: from its round log, because it sees no site's ledger."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privfl.accounting import ORDERS, Event, NonPrivate, divergences, event_from_dict
from privfl.admission.plan import run_facts

if TYPE_CHECKING:
    from privfl.config import Experiment
    from privfl.federation.news import ReadySite
    from privfl.reporting.history import History


def histories(
    run: str, folder: Path, experiment: Experiment, sites: Mapping[str, ReadySite], trust: str
) -> list[History]:
    """What the round log in ``folder`` says of each site.

    Args:
        sites: what each site said of itself before the first round.
    """
    rounds = [
        json.loads(line)
        for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [
        _history(run, folder, experiment, name, ready, rounds, trust)
        for name, ready in sites.items()
    ]


def _history(
    run: str,
    folder: Path,
    experiment: Experiment,
    site: str,
    ready: ReadySite,
    rounds: list[dict[str, Any]],
    trust: str,
) -> History:
    from privfl.reporting.history import Charged, History, ReportedRun
    from privfl.reporting.schema import Check

    mechanisms: list[Event] = []
    charges: list[Charged] = []

    def charge(when: str, round_: int, account: Any, event: Event) -> None:
        if event.once() not in mechanisms:
            mechanisms.append(event.once())
        charges.append(
            Charged(when, run, round_, account, mechanisms.index(event.once()), event.steps)
        )

    if not experiment.private:
        for account in (
            "training",
            *(["evaluation"] if any("evaluation" in r["sites"][site] for r in rounds) else []),
        ):
            charge(rounds[0]["time"], 0, account, NonPrivate(what="insecure_test_seed"))
    filter_epsilons: dict[Any, list[float]] = {}
    for record in rounds:
        said = {"training": record["sites"][site]} | {
            k: v for k, v in record["sites"][site].items() if k == "evaluation"
        }
        for account, cost in said.items():
            charge(record["time"], record["round"], account, event_from_dict(cost["event"]))
            if ready.accountant == "filter":
                filter_epsilons.setdefault(account, []).append(cost["epsilon"])
    whole = {"training": experiment.steps, "evaluation": experiment.metric_releases}
    plans: dict[Any, Event] = {
        c.account: mechanisms[c.mechanism].times(whole[c.account])
        for c in reversed(charges)
        if c.round
    }
    head = rounds[-1]["sites"][site]["head"]
    note = (
        "this report was made from the round log of the run; what the site itself wrote down is in "
        "its ledger"
    )
    kept = ready.ledger != "none"
    # The identities of the sites are in their own ledgers; rank 0 keeps none.
    facts = run_facts(
        experiment,
        plans,
        kept=kept,
        outside=ready.outside,
        members=dict.fromkeys(experiment.sites, ""),
    )
    return History(
        site=site,
        source=str(folder / "rounds.jsonl"),
        ledger=head["ledger"],
        rows=head["rows"],
        head=head["hash"],
        kept=kept,
        limits={},
        orders=ORDERS,
        mechanisms=mechanisms,
        vectors=[divergences(event) for event in mechanisms],
        charges=charges,
        runs=[ReportedRun(run, rounds[0]["time"], trust, facts)],
        checks=[Check(what="ledger", ok=None, detail=note)],
        filter_epsilons=filter_epsilons,
    )
