"""Results of audits as one page, in the style of the budget report."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import jinja2
import pydantic

from privacy_audits.registry import AUDITS
from privacy_audits.result import AuditResult, Results, Verdict
from privfl.errors import PrivflError, in_one_line
from privfl.reporting import html
from privfl.reporting.run_folder import RunFolder
from privfl.reporting.schema import Report


def read(path: Path) -> Results:
    """The results that `privfl audit run --json` wrote.

    Raises:
        PrivflError: If the file cannot be read, or holds anything else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PrivflError(f"cannot read {path}: {error.strerror}") from error
    try:
        return Results.model_validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise PrivflError(
            f"{path} holds no results of `privfl audit run --json`: {where}: "
            f"{in_one_line(first['msg'])}"
        ) from None


def add_to_run(results: Results, folder: Path) -> Path:
    """Write the page into the folder of a run, whose budget report then links to it.

    Returns:
        The path of the page.

    Raises:
        PrivflError: If the folder has no report of a finished run, or cannot be written.
    """
    path = folder / "report.json"
    try:
        text = path.read_text(encoding="utf-8")
        budget = Report.model_validate_json(text)
    except (OSError, pydantic.ValidationError) as error:
        problem = error.strerror if isinstance(error, OSError) else "it is no budget report"
        raise PrivflError(
            f"{folder} is not the folder of a finished run: cannot read {path}: {problem}"
        ) from None
    page = folder / html.AUDITS
    try:
        page.write_text(to_html(results), encoding="utf-8")
    except OSError as error:
        raise PrivflError(f"cannot write {page}: {error.strerror}") from error
    RunFolder(folder).write_report(text, html.to_html(budget, folder))
    return page


def to_html(results: Results) -> str:
    """The page; it holds everything it shows, and runs no script."""
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [
                jinja2.PackageLoader("privacy_audits", "."),
                jinja2.PackageLoader("privfl", "reporting"),
            ]
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent}
    asks = {audit.name: audit.asks for audit in AUDITS}
    groups = [
        (name, asks.get(name, ""), list(group))
        for name, group in groupby(results.results, key=_audit_of)
    ]
    by_verdict = {
        verdict.value: [r for r in results.results if r.verdict is verdict] for verdict in Verdict
    }
    bounds = [r for r in results.results if r.lower_bound is not None]
    return environment.get_template("report.html.j2").render(
        groups=groups, by_verdict=by_verdict, bounds=bounds, total=len(results.results)
    )


def _audit_of(result: AuditResult) -> str:
    return result.name.split("/")[0]


def number(value: float | None) -> str:
    """A measured number, to four digits."""
    return "—" if value is None else f"{value:.4g}"


def percent(value: float) -> str:
    """A probability; never rounded up to certainty."""
    if value == 1.0:
        return "100 %"
    return "above 99.9 %" if value > 0.999 else f"{100 * value:.1f} %"
