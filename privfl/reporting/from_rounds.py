"""What a run reports in the end: rank 0 from its round log, because it sees no site's ledger; and each site from its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privfl.accounting import ORDERS, Event, NonPrivate, divergences, event_from_dict
from privfl.errors import PrivflError, in_one_line

if TYPE_CHECKING:
    from privfl.config import Experiment
    from privfl.reporting.history import History


def histories(run: str, folder: Path, experiment: Experiment, sites: Mapping[str, Any], trust: str) -> list[History]:
    """What the round log in ``folder`` says of each site.

    Args:
        sites: what each site told of itself before the first round.
    """
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    return [_history(run, folder, experiment, name, facts, rounds, trust) for name, facts in sites.items()]


def _history(
    run: str,
    folder: Path,
    experiment: Experiment,
    site: str,
    facts: Mapping[str, Any],
    rounds: list[dict[str, Any]],
    trust: str,
) -> History:
    from privfl.reporting.history import Charged, History, RunFacts
    from privfl.reporting.schema import Check

    mechanisms: list[Event] = []
    charges: list[Charged] = []

    def charge(when: str, round_: int, account: Any, event: Event) -> None:
        if event.once() not in mechanisms:
            mechanisms.append(event.once())
        charges.append(Charged(when, run, round_, account, mechanisms.index(event.once()), event.steps))

    if not experiment.private:
        for account in ("training", *(["evaluation"] if any("evaluation" in r["sites"][site] for r in rounds) else [])):
            charge(rounds[0]["time"], 0, account, NonPrivate(what="insecure_test_seed"))
    told: dict[Any, list[float]] = {}
    for record in rounds:
        said = {"training": record["sites"][site]} | {k: v for k, v in record["sites"][site].items() if k == "evaluation"}
        for account, cost in said.items():
            charge(record["time"], record["round"], account, event_from_dict(cost["event"]))
            if facts["accountant"] == "filter":
                told.setdefault(account, []).append(cost["epsilon"])
    whole = {"training": experiment.steps, "evaluation": experiment.metric_releases}
    plans: dict[Any, Event] = {c.account: mechanisms[c.mechanism].times(whole[c.account]) for c in reversed(charges) if c.round}
    head = rounds[-1]["sites"][site]["head"]
    note = "this report was made from the round log of the run; what the site itself wrote down is in its ledger"
    return History(
        site=site,
        source=str(folder / "rounds.jsonl"),
        ledger=head["ledger"],
        rows=head["rows"],
        head=head["hash"],
        kept=facts["book"] != "none",
        limits={},
        orders=ORDERS,
        mechanisms=mechanisms,
        vectors=[divergences(event) for event in mechanisms],
        charges=charges,
        runs=[
            RunFacts(
                run=run,
                begun=rounds[0]["time"],
                model=experiment.model,
                data=experiment.data,
                members=experiment.sites,
                noise=experiment.privacy.noise,
                collusion=experiment.collusion,
                rounds=experiment.rounds,
                delta=experiment.privacy.delta,
                private=experiment.private,
                trust=trust,
                exact_metrics=tuple(sorted(experiment.evaluation.metrics)) if experiment.evaluation.records == "public" else (),
                outside=tuple(facts["outside"]),
                coordinator=True,
                records_per_person=1,
                plans=plans,
            )
        ],
        checks=[Check(what="ledger", ok=None, detail=note)],
        told=told,
    )


def write_page(path: Path) -> None:
    """The site's own report, beside its ledger. The run is over and sound: if this fails, it is said and nothing else."""
    from privfl.ledger import Ledger
    from privfl.reporting import from_ledger
    from privfl.reporting.build import report
    from privfl.reporting.html import to_html

    try:
        with Ledger.read(path) as ledger:
            found = report(f"Privacy budget of {ledger.site}", [from_ledger.history(ledger, from_ledger.checks(ledger, []))])
        path.with_suffix(".report.html").write_text(to_html(found), encoding="utf-8")
    except (PrivflError, OSError) as error:
        sys.stderr.write(f"privfl: the report beside the ledger {path} could not be written: {in_one_line(error)}\n")
