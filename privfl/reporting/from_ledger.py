"""Reading ledgers, and what was shown of their heads, into what a report is made from."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privfl.errors import PrivflError, ProtocolError, in_one_line

if TYPE_CHECKING:
    from privfl.accounting import Account
    from privfl.ledger import Head, Ledger, RunFacts
    from privfl.reporting.history import History, ReportedRun
    from privfl.reporting.schema import Check


@dataclass(frozen=True)
class Shown:
    """A head that a site showed once: in which round of which run, signed how, and the file that
    says so.
    """

    head: Head
    site: str
    run: str
    round: int
    attempt: int
    signature: str
    file: Path


def find(paths: Sequence[Path]) -> list[Path]:
    """The ledgers among files and folders, each once; folders are searched.

    Raises:
        PrivflError: If a path does not exist, or a folder holds no ledger.
    """
    ledgers: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir():
            inside = sorted(path.rglob("*.ledger"))
            if not inside:
                raise PrivflError(f"there is no ledger (*.ledger) in {path} or below")
            ledgers |= {file.resolve(): file for file in inside}
        elif path.exists():
            ledgers[path.resolve()] = path
        else:
            raise PrivflError(f"there is no ledger {path}")
    return list(ledgers.values())


def heads_in(paths: Iterable[Path]) -> list[Shown]:
    """All heads in round logs (``rounds.jsonl``) and sites' own notes (``heads.jsonl``): in
    these files, or anywhere below these folders.

    Raises:
        PrivflError: If a file cannot be read, or is no log of rounds or heads.
    """
    heads = []
    for path in paths:
        files = (
            [f for name in ("rounds.jsonl", "heads.jsonl") for f in sorted(path.rglob(name))]
            if path.is_dir()
            else [path]
        )
        for file in files:
            heads += _heads_of(file)
    return heads


def _heads_of(file: Path) -> list[Shown]:
    from privfl.ledger import Head

    heads = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except ValueError:
                # A crash may have cut a line off, but not all of them.
                if number == 1:
                    raise
                continue
            shown = record.get("heads") or {
                site: facts["head"] for site, facts in record["sites"].items()
            }
            for site, fields in shown.items():
                where = (
                    str(site),
                    str(record["run"]),
                    int(record["round"]),
                    int(fields["attempt"]),
                )
                heads.append(Shown(Head.from_dict(fields), *where, str(fields["signature"]), file))
    except OSError as error:
        raise PrivflError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PrivflError(
            f"{file} is no log of rounds or heads of privfl; name a run folder, its rounds.jsonl, "
            "or a site's heads.jsonl"
        ) from error
    return heads


def checks(ledger: Ledger, heads: Sequence[Shown]) -> list[Check]:
    """What can be said without computing divergences again: the chain held when the ledger was
    opened; now the heads.
    """
    from privfl.reporting.schema import Check

    verified = [
        Check(what="chain", ok=True, detail=f"the hashes of all {len(ledger.rows)} rows fit")
    ]
    of_this_ledger = [shown for shown in heads if shown.head.ledger == ledger.name]
    if not of_this_ledger:
        detail = (
            "no head of this ledger was given to compare with, so a tail that was cut off would "
            "not show"
        )
        others = {shown.head.ledger for shown in heads if shown.site == ledger.site}
        if others:
            detail = (
                f"site {ledger.site} showed heads of {len(others)} other ledgers, and none of this "
                "one: it may have been begun anew"
            )
        return [*verified, Check(what="heads", ok=False if others else None, detail=detail)]
    identities = {
        row.run: str(row.facts().get("identity", "")) for row in ledger.rows if row.kind == "run"
    }
    wrong = [
        f"{problem} ({shown.file})"
        for shown in of_this_ledger
        if (problem := _problem(ledger, shown, identities))
    ]
    detail = (
        wrong[0]
        if wrong
        else (
            f"{len(of_this_ledger)} signed heads that were shown to others fit, the last at row "
            f"{max(s.head.rows for s in of_this_ledger)}"
        )
    )
    return [*verified, Check(what="heads", ok=not wrong, detail=detail)]


def _problem(ledger: Ledger, shown: Shown, identities: dict[str, str]) -> str | None:
    from privfl.identity import verify
    from privfl.ledger import head_bytes

    known, signed = shown.run in identities, False
    try:
        verify(
            identities.get(shown.run, ""),
            bytes.fromhex(shown.signature),
            head_bytes(shown.head, shown.run, shown.round, shown.attempt),
        )
        signed = True
    except (ProtocolError, ValueError):
        if known:
            return (
                f"the head of round {shown.round} of run {shown.run[:8]} is not signed by the site "
                "that wrote this ledger"
            )
    missing = ledger.compare(shown.head)
    if missing is not None:
        return (
            missing if signed else f"{missing} (this ledger does not know the run, nor who signed)"
        )
    refund = next(
        (
            row
            for row in ledger.rows
            if row.kind == "refund" and (row.run, row.round) == (shown.run, shown.round)
        ),
        None,
    )
    if refund is not None and refund.account == "training":
        return (
            f"row {refund.number} refunds round {refund.round} of run {refund.run[:8]}, which "
            "left: its head was shown"
        )
    return None


def history(ledger: Ledger, verified: list[Check]) -> History:
    """The history in a ledger; ``verified`` is what was checked of it."""
    from privfl.accounting import account_of
    from privfl.ledger import RunFacts
    from privfl.reporting.history import Charged, History

    numbers = list(ledger.events)
    index = {number: i for i, number in enumerate(numbers)}
    charges = [
        Charged(
            row.time,
            row.run,
            row.round,
            account_of(row.account),
            index[row.mechanism],
            row.net_steps,
        )
        for row in ledger.charges()
    ]
    runs = [
        _reported(row.run, row.time, RunFacts.from_dict(row.facts()))
        for row in ledger.rows
        if row.kind == "run"
    ]
    kept = any(reported.facts.kept for reported in runs)
    limits: dict[Account, Any] = dict(ledger.filters) if kept else {}
    return History(
        site=ledger.site,
        source=str(ledger.path),
        ledger=ledger.name,
        rows=len(ledger.rows),
        head=ledger.head.hash,
        kept=kept,
        limits=limits,
        orders=ledger.orders,
        mechanisms=[ledger.events[number] for number in numbers],
        vectors=[ledger.vector(number) for number in numbers],
        charges=charges,
        runs=runs,
        checks=verified,
    )


def _reported(run: str, begun: str, facts: RunFacts) -> ReportedRun:
    from privfl.reporting.history import ReportedRun

    trust = "keys of the other sites not pinned: single trust domain"
    if facts.pinned:
        trust = (
            "this site has pinned the keys of all others; single trust domain all the same if they "
            "ran under one account"
        )
    return ReportedRun(run, begun, trust, facts)


def write_page(path: Path) -> None:
    """The site's own report, beside its ledger.

    The run is over and sound: if this fails, it is said and nothing else.
    """
    from privfl.ledger import Ledger
    from privfl.reporting.build import report
    from privfl.reporting.html import to_html

    try:
        with Ledger.read(path) as ledger:
            page = report(f"Privacy budget of {ledger.site}", [history(ledger, checks(ledger, []))])
        path.with_suffix(".report.html").write_text(to_html(page, path.parent), encoding="utf-8")
    except (PrivflError, OSError) as error:
        sys.stderr.write(
            f"privfl: the report beside the ledger {path} could not be written: "
            f"{in_one_line(error)}\n"
        )
