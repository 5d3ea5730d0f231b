"""Reports to make pages from."""

from __future__ import annotations

import pytest

from privfl.reporting.schema import (
    FORMAT,
    Account,
    Adversary,
    Budget,
    Charge,
    Check,
    Cost,
    Epsilon,
    Person,
    Point,
    Report,
    Run,
    SiteReport,
)

HOSTILE = "<script>alert(1)</script>\"'&{{ 7*7 }}$x_2$\u202e\x00"
FINE = [
    Check(what="chain", ok=True, detail="the hashes of all 71 rows fit"),
    Check(what="heads", ok=True, detail="9 heads fit"),
]
BROKEN = [FINE[0], Check(what="heads", ok=False, detail="rows were cut off")]
UNSEEN = [FINE[0], Check(what="heads", ok=None, detail="no head was given")]
LONG = "universitaetsklinikum-am-anderen-ende-des-langen-tales-abteilung-fuer-herz-und-gefaesse"


def cost(
    epsilon: Epsilon = 1.23456,
    *,
    kept: bool = True,
    kind: str = "poisson_gaussian",
    persons: bool = True,
) -> Cost:
    person = Person(records=3, epsilon=4.00011, delta=2e-5) if persons else None
    return Cost(
        mechanism=kind,
        sampling_rate=0.125,
        noise_multiplier=1.75,
        steps=47,
        delta=1e-5,
        accountant="filter" if kept else "rdp",
        epsilon=epsilon,
        rdp=1.19994 if epsilon != "infinite" else epsilon,
        pld=1.05551 if epsilon != "infinite" else None,
        filter=epsilon if kept else None,
        person=person,
    )


def site_report(
    site: str = "zurich",
    *,
    runs: int | list[Run] = 2,
    kept: bool = True,
    points: int = 20,
    members: int = 3,
    **changes: object,
) -> SiteReport:
    """A report on one site with so many points on its curve, in which run i is 'f00i...'."""
    text = str(changes.pop("text", "heart.py:model"))
    spent = changes.pop("spent", 1.9718810197)
    private = bool(changes.pop("private", True))
    if isinstance(runs, list):
        runs, changes["runs"] = 1, runs
    names = [f"f{i:03d}" + "ab" * 14 for i in range(1, runs + 1)]
    stamps = [f"2026-03-{1 + i % 28:02d}T10:{i % 60:02d}:07Z" for i in range(points)]
    run_at = [names[i * runs // points] for i in range(points)]
    infinite = spent == "infinite"
    values: list[Epsilon] = [
        "infinite" if infinite else 0.5 + (float(spent) - 0.5) * i / (points - 1)
        for i in range(points)
    ]

    def account(name: str) -> Account:
        charges = [
            Charge(
                run=run,
                rounds="1-5, 7",
                first=stamps[0],
                last=stamps[-1],
                kind="poisson_gaussian" if name == "training" else "metric_release",
                sampling_rate=0.125,
                noise_multiplier=1.75,
                most_noise=1.75,
                mechanisms=1,
                steps=47,
                refunded=3,
            )
            for run in names
        ]
        curve = [
            Point(
                charge=i + 1,
                time=stamps[i],
                run=run_at[i],
                round=i + 1,
                epsilon=value if name == "training" else 0.1 + i / 100,
            )
            for i, value in enumerate(values)
        ]
        total = spent if name == "training" else curve[-1].epsilon
        person = Person(records=3, epsilon=9.87654, delta=3 * 1e-5)
        return Account(
            account=name,
            accountant="filter" if kept else "rdp",
            delta=1e-5,
            spent=total,
            person=person,
            charges=charges,
            curve=curve,
        )

    def run(name: str) -> Run:
        found = [
            Adversary(
                who="the coordinator alone",
                sees="masked updates",
                epsilon=None,
                because="encryption: it has no key",
            )
        ]
        found += [
            Adversary(
                who=f"{k} other sites together",
                sees=text,
                epsilon="infinite" if infinite else 1.23456,
                because="noise",
            )
            for k in range(1, members)
        ]
        return Run(
            run=name,
            begun="2026-03-01T10:00:00Z",
            model=text,
            data=text,
            members=[site, *(f"site-{i}" for i in range(1, members))],
            rounds_planned=23,
            rounds_charged=17,
            trust="keys of the other sites not pinned: single trust domain",
            private=private,
            exact_metrics=["accuracy", "recall"] if name == names[0] else [],
            outside=["scaling reads every record without noise"] if name == names[0] else [],
            training=cost("infinite" if infinite else 1.23456, kept=kept),
            evaluation=cost(0.34567, kept=kept, kind="metric_release"),
            adversaries=found if members > 1 else [],
        )

    fields = {
        "site": site,
        "source": f"/srv/{site}/budget.ledger",
        "kept": kept,
        "ledger": "0123456789abcdef" * 2,
        "rows": 71,
        "head": "fedcba9876543210" * 4,
        "budget": Budget(epsilon=3.0, delta=1e-5) if kept else None,
        "checks": FINE,
        "accounts": [account("training"), account("evaluation")],
        "runs": [run(name) for name in names],
    }
    return SiteReport.model_validate(fields | changes)


def report(*sites: SiteReport, title: str = "Privacy budget") -> Report:
    return Report(
        format=FORMAT,
        made="2026-11-25T20:59:36Z",
        version="0.1.0",
        title=title,
        unit="one record",
        adjacency="zero-out of one record (numerically add/remove)",
        sampling="Poisson: every record enters a step independently of all others",
        sites=list(sites),
    )


VARIANTS = {
    "usual": report(site_report("basel", checks=UNSEEN), site_report("zurich")),
    "not kept": report(site_report(kept=False, checks=[], ledger=None, rows=None, head=None)),
    "failed": report(site_report(checks=BROKEN)),
    "infinite": report(site_report(spent="infinite", private=False)),
    "alone": report(site_report(members=1, runs=1)),
    "hostile": report(site_report(HOSTILE, text=HOSTILE, source=HOSTILE), title=HOSTILE),
    "long names": report(site_report(LONG, text=LONG * 2, members=10)),
    "many runs": report(site_report(runs=100, points=400)),
    "nothing": report(site_report(runs=[], accounts=[]), site_report("bern", accounts=[])),
    "empty": report(),
}
every_page = pytest.mark.parametrize("name", VARIANTS)
