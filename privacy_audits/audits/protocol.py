"""A coordinator that cheats: what do sites do, and what does it get?

Each trick is a real run in which rank 0 changes what it relays. A claim stands if every site
refuses, and none sends a contribution or moves its model on what the trick changed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from privacy_audits.audits.transcript import COORDINATOR
from privacy_audits.levels import LEVEL
from privacy_audits.result import AuditResult, Claim, Statistic
from privacy_audits.targets.cheating import TRICKS
from privacy_audits.targets.job import Launch, RecordedRun, record
from privfl.federation.messages import Kind, is_kind
from privfl.ledger import Ledger

_CLAIMS = {
    "swapped-key": "The coordinator cannot put a key of its own between two sites.",
    "swapped-identity": "The coordinator cannot pose as a site towards another one.",
    "invented-member": "The coordinator cannot invent a site whose keys it holds.",
    "other-records": "The coordinator cannot tell sites different numbers of records.",
    "altered-sum": "The coordinator cannot alter a sum unnoticed.",
    "two-sums": "The coordinator cannot give sites different sums, or have a round refunded that "
    "left.",
    "old-sum": "The coordinator cannot give an old sum out as a new one.",
    "repeated-attempt": "The coordinator cannot have a contribution made twice under one mask.",
    "second-attempt": "The coordinator cannot have a contribution made twice for one charge.",
}
# Tricks with sums come in the second round, after a good sum by which models have moved; of two
# different sums one is good, and some sites move by that too.
_MOVED = {"altered-sum": 1, "two-sums": 2, "old-sum": 1, "repeated-attempt": 1, "second-attempt": 1}
# Where the trick comes after contributions, no more of them may follow; where it changes a sum they
# have been given already, and are paid for.
_GIVEN = ("altered-sum", "two-sums", "old-sum")


def results(
    folder: Path, through: tuple[str, ...], say: Callable[[str], None]
) -> Iterator[AuditResult]:
    """One result for each trick."""
    for trick in TRICKS:
        say(f"recording a run whose coordinator cheats: {trick} ...")
        began = time.perf_counter()
        where = Path(tempfile.mkdtemp(prefix=f"{trick}-", dir=folder))
        launch = Launch(("privacy_audits.targets.cheating", trick), through)
        run = record("fedsgd", where, launch)
        yield _judged(trick, run, time.perf_counter() - began)


def _judged(trick: str, run: RecordedRun, seconds: float) -> AuditResult:
    tricked = bool(run.ranks) and bool(run.ranks[0].happened("tricked"))
    gained = _gained(trick, run) + _unpaid(run) if tricked else 0
    refused = tricked and run.exit_code != 0
    return AuditResult(
        name=f"protocol/{trick}",
        claim=Claim(statement=_CLAIMS[trick], adversary=COORDINATOR),
        attack=" ".join((TRICKS[trick].__doc__ or "").split()),
        statistic=Statistic.exact(
            "contributions given and models moved after the trick, and contributions that no "
            "ledger has",
            gained,
            "0, and the run ends",
            holds=not tricked or (refused and gained == 0),
        ),
        confidence=1.0 - LEVEL,
        # A trick that was not played shows nothing.
        power=1.0 if tricked else 0.0,
        power_against="a site that does not check",
        seconds=seconds,
    )


def _gained(trick: str, run: RecordedRun) -> int:
    """Contributions that reached the coordinator after the trick, and steps that models took
    beyond those before it.
    """
    when = run.ranks[0].happened("tricked")[0]["order"]
    given = 0
    if trick not in _GIVEN:
        for event in run.ranks[0].happened("received"):
            contribution = is_kind(bytes.fromhex(event["head"]), Kind.CONTRIBUTION)
            given += event["order"] > when and contribution
    # The first replica is that before the first round.
    moves = max((len(site.arrays.get("replica", ())) - 1 for site in run.sites), default=0)
    return given + max(0, moves - _MOVED.get(trick, 0))


def _unpaid(run: RecordedRun) -> int:
    """Rounds that left a site and that its ledger does not have, of all sites."""
    steps = {}
    for path in run.ledgers:
        with Ledger.read(path) as ledger:
            steps[ledger.site] = sum(ledger.steps("training").values())
    return sum(
        max(0, len(site.happened("contributed")) - steps.get(name, 0))
        for name, site in zip(run.experiment.sites, run.sites, strict=True)
    )
