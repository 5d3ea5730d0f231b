"""`privfl audit`: attacks on what privfl claims."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from privfl.cli.help import example
from privfl.errors import PrivflError

if TYPE_CHECKING:
    from privacy_audits.registry import Audit
    from privacy_audits.result import AuditResult, Results


@click.group(
    name="audit",
    short_help="Attack what privfl claims, and say what came out.",
    epilog=example(
        "privfl audit run --quick --json audits.json",
        "privfl audit report audits.json, for a page to read",
    ),
)
def audit() -> None:
    """Attack what privfl claims, and say what came out.

    Audits train on made-up records; they touch no ledger but those of their own runs.
    """


@audit.command(
    name="list",
    short_help="Show all audits and the question that each answers.",
    epilog=example("privfl audit list", "privfl audit run NAME"),
)
def list_audits() -> None:
    """Show all audits and the question that each answers."""
    from privacy_audits.registry import AUDITS

    width = max(len(audit.name) for audit in AUDITS)
    for one in AUDITS:
        quick = "quick" if one.quick else "full "
        click.echo(f"{one.name:{width}}  {quick}  {one.asks}")


@audit.command(
    short_help="Run audits: all of them, the quick ones, or those that are named.",
    epilog=example(
        "privfl audit run conformance canaries --json audits.json",
        "privfl audit report audits.json, for a page to read",
    ),
)
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--quick", is_flag=True, help="Run only the audits that take seconds.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write all results into this file.",
)
@click.option(
    "--experiment",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With the audit canaries: insert canaries into this experiment, and attack that.",
)
@click.option(
    "--sites",
    type=click.Path(path_type=Path, file_okay=False),
    help="With --experiment: folder with one file per site, of which data_options are used; by "
    "default sites/ beside it.",
)
@click.option("--no-sites", is_flag=True, help="With --experiment: use no site files.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY.PATH=VALUE",
    help="With --experiment: change one value of it; may be repeated.",
)
@click.option("--schema", is_flag=True, help="Print the JSON schema of the results instead.")
def run(
    names: tuple[str, ...],
    quick: bool,
    json_file: Path | None,
    experiment: Path | None,
    sites: Path | None,
    no_sites: bool,
    settings: tuple[str, ...],
    schema: bool,
) -> None:
    """Run audits: all of them, the quick ones, or those that are named.

    With --experiment the audit canaries attacks a model of your own, in a run that claims epsilon 1
    or less and charges nothing: what data() returns must be public or made up.

    Exit code 2 if a claim is refuted.
    """
    from privacy_audits.registry import Workshop, named
    from privacy_audits.result import Results, Verdict
    from privfl.config import sites_folder

    if schema:
        click.echo(json.dumps(Results.model_json_schema(mode="serialization"), indent=2))
        return
    if experiment is not None and names != ("canaries",):
        raise PrivflError(
            "--experiment is for the audit canaries alone: privfl audit run canaries --experiment "
            f"{experiment}"
        )
    if experiment is None and (sites or no_sites or settings):
        raise PrivflError(
            "--sites, --no-sites and --set are about an experiment; name it with --experiment"
        )
    sites = sites_folder(experiment, sites, no_sites)
    chosen = (_of(experiment, sites, settings),) if experiment else named(names, quick)
    if json_file is not None:
        # Before minutes of work, not after.
        _write(json_file, "")
    began = time.perf_counter()
    results = []
    with tempfile.TemporaryDirectory(prefix="privfl-audit-") as folder:
        shop = Workshop(Path(folder), quick, say=lambda text: click.echo(text, err=True))
        for one in chosen:
            click.echo(f"{one.name}: {one.asks}", err=True)
            for result in one.run(shop):
                results.append(result)
                click.echo(_line(result))
    made = Results(results=tuple(results))
    if json_file is not None:
        _write(json_file, made.model_dump_json(indent=2) + "\n")
    click.echo(f"{_counts(made)} in {time.perf_counter() - began:.0f} s")
    refuted = [r.name for r in results if r.verdict is Verdict.REFUTED]
    if refuted:
        raise PrivflError(
            f"REFUTED: {refuted[0]}"
            + (f" (and {len(refuted) - 1} more)" if refuted[1:] else "")
            + "; do not use this installation with real records before you know why"
        )


def _of(path: Path, sites: Path | None, settings: tuple[str, ...]) -> Audit:
    """The audit of an experiment."""
    from privacy_audits.audits import experiment
    from privacy_audits.registry import Audit

    chosen = experiment.target(path, sites, settings)
    return Audit(
        "canaries",
        f"How much of epsilon can be shown of {path}?",
        False,
        lambda shop: experiment.results(chosen, shop.folder, shop.through, shop.say),
    )


def _line(result: AuditResult) -> str:
    value = result.statistic.value
    number = "" if value is None else f"{value:.4g}"
    p_value = result.statistic.p_value
    chance = "" if p_value in (0.0, 1.0) else f"; p {p_value:.2g}"
    bound = (
        f"; epsilon at least {result.lower_bound:.2f} of {result.claim.epsilon:.2f} claimed"
        if result.lower_bound is not None and result.claim.epsilon is not None
        else ""
    )
    return (
        f"  {result.verdict:12}  {result.name}: {result.statistic.name} {number} "
        f"(expected {result.statistic.expected}{chance}{bound})"
    )


def _counts(results: Results) -> str:
    from privacy_audits.result import Verdict

    verdicts = [result.verdict for result in results.results]
    return ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in Verdict)


@audit.command(
    short_help="Show which planted defects which audits notice.",
    epilog=example(
        "privfl audit sabotage --defect noise-halved --repeat 20",
        "docs/audits.md, for the whole matrix with its rates",
    ),
)
@click.option("--defect", "defects", multiple=True, help="Plant only this defect; may be repeated.")
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How often a defect is planted that is noticed with a probability only.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the matrix into this file.",
)
def sabotage(defects: tuple[str, ...], repeat: int, json_file: Path | None) -> None:
    """Plant defects in privfl, one at a time, and show which audits notice them.

    Nothing of the installation is changed: every defect lives in the processes of one run.
    """
    from privacy_audits.sabotage.matrix import matrix

    rows = []
    for row in matrix(defects, repeat, lambda text: click.echo(text, err=True)):
        rows.append(row)
        click.echo(row.line())
    if json_file is not None:
        _write(json_file, json.dumps({"defects": [r.as_dict() for r in rows]}, indent=2) + "\n")
    unseen = [row.defect for row in rows if not row.seen]
    if unseen:
        raise PrivflError(f"NOT NOTICED: {', '.join(unseen)}")


@audit.command(
    short_help="Write results as a page to read.",
    epilog=example(
        "privfl audit report audits.json --output audits.html",
        "open audits.html in a browser, or print it",
    ),
)
@click.argument("results", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file to write; audit-report.html by default.",
)
@click.option(
    "--run",
    "run_folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write it into this folder of a finished run instead, whose report then links to it.",
)
def report(results: Path, output: Path | None, run_folder: Path | None) -> None:
    """Write RESULTS, which `privfl audit run --json` made, as one page for screen and paper."""
    from privacy_audits.report import add_to_run, read, to_html

    if output is not None and run_folder is not None:
        raise PrivflError("--output and --run both say where the page goes; leave one out")
    made = read(results)
    if run_folder is not None:
        click.echo(f"wrote {add_to_run(made, run_folder)}")
        return
    path = output or Path("audit-report.html")
    _write(path, to_html(made))
    click.echo(f"wrote {path}")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PrivflError(f"cannot write {path}: {error.strerror}") from error


__all__ = ["audit"]
