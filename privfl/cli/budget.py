"""`privfl budget`: what sites have spent, for their owners and for those who must check it."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from privfl.cli.help import example
from privfl.errors import PrivflError

if TYPE_CHECKING:
    from privfl.reporting.history import History

_PATHS = click.argument("ledgers", nargs=-1, required=True, type=click.Path(path_type=Path))
_HEADS = click.option(
    "--heads",
    multiple=True,
    type=click.Path(path_type=Path, exists=True),
    help=(
        "Run folder, rounds.jsonl or heads.jsonl with heads that were shown to others; may be "
        "repeated."
    ),
)


@click.group(
    name="budget",
    short_help="Show, report, verify or export what sites have spent.",
    epilog=example(
        "privfl budget show runs",
        "privfl budget report runs, for the page that a data protection officer reads",
    ),
)
def command() -> None:
    """Show, report, verify or export what sites have spent of their privacy budgets.

    LEDGERS are files, or folders in which all *.ledger files count.
    """


def _histories(ledgers: Sequence[Path], heads: Sequence[Path]) -> list[History]:
    from privfl.ledger import Ledger
    from privfl.reporting import from_ledger

    # In a run folder the heads that were shown lie beside the ledgers.
    shown = from_ledger.heads_in([*heads, *(path for path in ledgers if path.is_dir())])
    histories = []
    for path in from_ledger.find(ledgers):
        with Ledger.read(path) as ledger:
            histories.append(from_ledger.history(ledger, from_ledger.checks(ledger, shown)))
    return sorted(histories, key=lambda history: history.site)


@command.command(
    short_help="Show on the terminal what is spent and what remains.",
    epilog=example("privfl budget show runs", "privfl budget report runs, for a page to hand on"),
)
@_PATHS
@_HEADS
def show(ledgers: tuple[Path, ...], heads: tuple[Path, ...]) -> None:
    """Show on the terminal what is spent and what remains."""
    from rich.console import Console
    from rich.table import Table

    from privfl.accounting import ADJACENCY

    histories = _histories(ledgers, heads)
    table = Table(
        "site", "records", "epsilon spent", "of", "delta", "runs", "rounds", "steps", "ledger"
    )
    for history in histories:
        for line in _lines(history):
            table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    click.echo(
        f"epsilon protects one record ({ADJACENCY}); training and evaluation records are accounts "
        "of their own"
    )
    if not all(history.kept for history in histories):
        click.echo(
            "no ledger is kept across runs where the last column says so: those epsilons are of "
            "one run"
        )
    bad = [
        f"{history.site}: {check.detail}"
        for history in histories
        for check in history.checks
        if check.ok is False
    ]
    if bad:
        raise PrivflError(f"NOT VERIFIED: {bad[0]}")


def _lines(history: History) -> Iterator[tuple[str, ...]]:
    from privfl.accounting import ACCOUNTS
    from privfl.reporting.build import spent
    from privfl.reporting.numbers import decimals

    state = (
        "one run"
        if not history.kept
        else "NOT VERIFIED"
        if any(check.ok is False for check in history.checks)
        else "kept"
    )
    for account in ACCOUNTS:
        charges = [charge for charge in history.charges if charge.account == account]
        if not charges and account not in history.limits:
            continue
        epsilon, delta, steps = spent(history, account)
        limit = history.limits.get(account)
        yield (
            history.site,
            account,
            decimals(epsilon),
            "" if limit is None else f"{limit.epsilon:g}",
            f"{delta:g}",
            str(len(history.runs)),
            str(len({(charge.run, charge.round) for charge in charges})),
            str(steps),
            state,
        )


@command.command(
    short_help="Write a report that a data protection officer can read.",
    epilog=example(
        "privfl budget report /ledgers --heads runs --output report.html",
        "open report.html in a browser, or print it",
    ),
)
@_PATHS
@_HEADS
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("budget-report.html"),
    show_default=True,
    help="The file to write.",
)
def report(ledgers: tuple[Path, ...], heads: tuple[Path, ...], output: Path) -> None:
    """Write a report that a data protection officer can read: one HTML file, for screen and
    paper.
    """
    from privfl.reporting.build import report as compute
    from privfl.reporting.html import to_html

    page = compute("Privacy budget", _histories(ledgers, heads))
    _write(output, to_html(page, output.parent))
    click.echo(f"wrote {output}")


@command.command(
    short_help="Check a ledger: its chain, its costs, its limits, and heads shown to others.",
    epilog=example(
        "privfl budget verify /ledgers/aa.ledger --heads runs",
        "keep run folders: their heads show later whether rows were taken back",
    ),
)
@click.argument("ledger", type=click.Path(path_type=Path))
@click.argument(
    "more_heads", metavar="[HEADS]...", nargs=-1, type=click.Path(path_type=Path, exists=True)
)
@_HEADS
def verify(ledger: Path, more_heads: tuple[Path, ...], heads: tuple[Path, ...]) -> None:
    """Check LEDGER, a file or a folder of them, against itself and against what others were shown.

    Checked are the chain of its rows, the costs in it, its limits, and the heads that were shown to
    others. Without any head, a tail that was cut off does not show. HEADS after the ledger mean the
    same as --heads.
    """
    from privfl.ledger import Ledger
    from privfl.reporting import from_ledger

    shown = from_ledger.heads_in([*more_heads, *heads, *([ledger] if ledger.is_dir() else [])])
    problems = []
    for path in from_ledger.find([ledger]):
        with Ledger.read(path) as opened:
            checks = from_ledger.checks(opened, shown)
            wrong_costs = opened.problems()
            for check in checks:
                click.echo(
                    f"{path}: {check.what}: "
                    f"{'ok' if check.ok else 'WRONG' if check.ok is False else 'not checked'}: "
                    f"{check.detail}"
                )
            if not wrong_costs:
                click.echo(
                    f"{path}: costs: ok: recomputed from the events, and within the budget at "
                    "every charge"
                )
            problems += [
                f"{path}: {problem}"
                for problem in [*(c.detail for c in checks if c.ok is False), *wrong_costs]
            ]
    if problems:
        raise PrivflError(
            f"NOT VERIFIED: {problems[0]}"
            + (f" (and {len(problems) - 1} more)" if problems[1:] else "")
        )


@command.command(
    short_help="Write every charge, or the report as JSON, for other programs.",
    epilog=example(
        "privfl budget export runs --format csv --output charges.csv",
        "privfl budget export --schema, for what the JSON form holds",
    ),
)
@click.argument("ledgers", nargs=-1, type=click.Path(path_type=Path))
@_HEADS
@click.option(
    "--format",
    "form",
    type=click.Choice(["json", "csv"]),
    default="json",
    show_default=True,
    help="JSON: the report; CSV: every charge.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="The file to write; standard output if none is given.",
)
@click.option("--schema", is_flag=True, help="Print the JSON schema of the report instead.")
def export(
    ledgers: tuple[Path, ...],
    heads: tuple[Path, ...],
    form: Literal["json", "csv"],
    output: Path | None,
    schema: bool,
) -> None:
    """Write the report as JSON, or every single charge as CSV, for other programs."""
    from privfl.reporting.build import report as compute
    from privfl.reporting.schema import Report

    if schema:
        text = json.dumps(Report.model_json_schema(mode="serialization"), indent=2) + "\n"
    elif not ledgers:
        raise PrivflError("name the ledgers to export, or a folder of them")
    elif form == "json":
        text = (
            compute("Privacy budget", _histories(ledgers, heads)).model_dump_json(indent=2) + "\n"
        )
    else:
        text = "".join(_csv(_histories(ledgers, heads)))
    if output is None:
        click.echo(text, nl=False)
    else:
        _write(output, text)
        click.echo(f"wrote {output}")


def _csv(histories: Sequence[History]) -> Iterator[str]:
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(
        [
            "site",
            "ledger",
            "time",
            "run",
            "round",
            "records",
            "mechanism",
            "sampling_rate",
            "noise_multiplier",
            "sigma",
            "steps",
        ]
    )
    for history in histories:
        for charge in history.charges:
            event = history.mechanisms[charge.mechanism]
            where = [
                history.site,
                history.ledger or "",
                charge.time,
                charge.run,
                charge.round,
                charge.account,
            ]
            table.writerow([*where, event.kind, event.rate, event.noise, event.sigma, charge.steps])
    yield buffer.getvalue()


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PrivflError(f"cannot write {path}: {error.strerror}") from error
