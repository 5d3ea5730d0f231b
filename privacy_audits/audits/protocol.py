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
from privacy_audits.targets.job import RecordedRun, record
from privfl.federation.messages import Kind, is_kind

_CLAIMS = {
    "swapped-key": "The coordinator cannot put a key of its own between two sites.",
    "swapped-identity": "The coordinator cannot pose as a site towards another one.",
    "invented-member": "The coordinator cannot invent a site whose keys it holds.",
    "other-records": "The coordinator cannot tell sites different numbers of records.",
    "altered-sum": "The coordinator cannot alter a sum unnoticed.",
    "old-sum": "The coordinator cannot give an old sum out as a new one.",
    "repeated-attempt": "The coordinator cannot have a contribution made twice under one mask.",
}
# How often the models of a site may have moved when the trick came: tricks with sums come in the
# second round, after one good sum.
_MOVED = {"altered-sum": 1, "old-sum": 1, "repeated-attempt": 1}


def results(folder: Path, say: Callable[[str], None]) -> Iterator[AuditResult]:
    """One result for each trick."""
    for trick in TRICKS:
        say(f"recording a run whose coordinator cheats: {trick} ...")
        began = time.perf_counter()
        where = Path(tempfile.mkdtemp(prefix=f"{trick}-", dir=folder))
        run = record("fedsgd", where, ("privacy_audits.targets.cheating", trick))
        yield _judged(trick, run, time.perf_counter() - began)


def _judged(trick: str, run: RecordedRun, seconds: float) -> AuditResult:
    tricked = bool(run.ranks) and bool(run.ranks[0].happened("tricked"))
    given, moved = _gained(trick, run) if tricked else (0, 0)
    refused = tricked and run.exit_code != 0
    return AuditResult(
        name=f"protocol/{trick}",
        claim=Claim(statement=_CLAIMS[trick], adversary=COORDINATOR),
        attack=(TRICKS[trick].__doc__ or "").strip(),
        statistic=Statistic.exact(
            "contributions given, and models moved, after the trick",
            given + moved,
            "0, and the run ends",
            holds=not tricked or (refused and given + moved == 0),
        ),
        confidence=1.0 - LEVEL,
        # A trick that was not played shows nothing.
        power=1.0 if tricked else 0.0,
        power_against="a site that does not check",
        seconds=seconds,
    )


def _gained(trick: str, run: RecordedRun) -> tuple[int, int]:
    """Contributions that reached the coordinator after the trick, and steps that models took
    beyond those before it.
    """
    when = run.ranks[0].happened("tricked")[0]["order"]
    given = 0
    if trick not in _MOVED:
        for event in run.ranks[0].happened("received"):
            contribution = is_kind(bytes.fromhex(event["head"]), Kind.CONTRIBUTION)
            given += event["order"] > when and contribution
    # The first replica is that before the first round.
    moves = max((len(site.arrays.get("replica", ())) - 1 for site in run.sites), default=0)
    return given, max(0, moves - _MOVED.get(trick, 0))
