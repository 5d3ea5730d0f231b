"""The report as one page of HTML that loads nothing: for a data protection officer, on a screen
and on paper.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from privfl.accounting import DiscreteGaussian
from privfl.reporting.numbers import plain, up
from privfl.reporting.schema import Account, Charge, Check, Cost, Epsilon, Report, Run, SiteReport

if TYPE_CHECKING:
    from markupsafe import Markup

RECORDS: Final = {"training": "training records", "evaluation": "evaluation records"}
MECHANISMS: Final = {
    "poisson_gaussian": "Gaussian noise on a random sample of the records",
    "gaussian": "Gaussian noise on all records",
    "discrete_gaussian": "discrete Gaussian noise on a random sample of the records",
    "metric_release": "metrics with Gaussian noise",
    "non_private": "released WITHOUT protecting noise",
}
ACCOUNTANTS: Final = {"filter": "filter", "rdp": "RDP"}
# What would garble a page or turn the direction of the text after it.
_UNPRINTABLE: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e"
    "\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
# The page of `privfl audit report` in a folder with reports.
AUDITS: Final = "audit-report.html"
_MILLION, _SEPARATED = 1e6, 1e4
# Runs that a sentence can name.
_NAMED = 8


@dataclass(frozen=True)
class Plots:
    """The plots of one account."""

    account: Account
    curve: Markup
    runs: Markup


@dataclass(frozen=True)
class Site:
    """One site as the page shows it.

    Attributes:
        key: what all ids of this site in the page begin with.
        numbers: runs counted from 1, by their ids.
        charged: how many runs were charged.
        newest: the newest run with adversaries, if there is one.
        wrong: checks that failed.
        open: checks that could not be made.
    """

    key: str
    report: SiteReport
    numbers: dict[str, int]
    charged: int
    plots: list[Plots]
    newest: Run | None
    wrong: list[Check]
    open: list[Check]

    @property
    def name(self) -> str:
        return self.report.site

    @property
    def training(self) -> Account | None:
        return self._account("training")

    @property
    def evaluation(self) -> Account | None:
        return self._account("evaluation")

    def _account(self, name: str) -> Account | None:
        return next((account for account in self.report.accounts if account.account == name), None)

    @property
    def costs(self) -> list[tuple[Run, str, Cost]]:
        """What every run cost each kind of record."""
        pairs = [(run, name, getattr(run, name)) for run in self.report.runs for name in RECORDS]
        return [(run, name, cost) for run, name, cost in pairs if cost is not None]

    @property
    def charges(self) -> list[tuple[Account, Charge]]:
        """All charges, by run and then by kind of record."""
        charges = [
            (account, charge) for account in self.report.accounts for charge in account.charges
        ]
        return sorted(charges, key=lambda pair: self.numbers[pair[1].run])

    @property
    def budget_elsewhere(self) -> bool:
        """Whether the site has a budget that this report does not know: a filter admitted runs."""
        accountants = {account.accountant for account in self.report.accounts}
        return self.report.budget is None and "filter" in accountants

    @property
    def persons(self) -> list[int]:
        """The numbers of records of a person for which there are epsilons, rising."""
        known = {cost.person.records for _, _, cost in self.costs if cost.person is not None}
        return sorted(
            known
            | {
                account.person.records
                for account in self.report.accounts
                if account.person is not None
            }
        )

    @property
    def discrete(self) -> bool:
        """Whether a run had discrete noise."""
        return any(cost.mechanism == DiscreteGaussian.kind for _, _, cost in self.costs)

    @property
    def unprotected(self) -> list[Run]:
        """Runs that are not private at all."""
        return [run for run in self.report.runs if not run.private]

    @property
    def exact(self) -> dict[tuple[str, ...], list[Run]]:
        """Metrics that were released without noise, and the runs that did."""
        runs: dict[tuple[str, ...], list[Run]] = {}
        for run in self.report.runs:
            if run.exact_metrics:
                runs.setdefault(tuple(run.exact_metrics), []).append(run)
        return runs

    @property
    def outside(self) -> dict[str, list[Run]]:
        """What a run's data() says that no epsilon covers, and the runs."""
        runs: dict[str, list[Run]] = {}
        for run in self.report.runs:
            for text in run.outside:
                runs.setdefault(text, []).append(run)
        return runs

    @property
    def unbounded(self) -> list[Account]:
        """Accounts with an infinite epsilon."""
        return [account for account in self.report.accounts if _infinite(account.spent)]


def to_html(report: Report, folder: Path | None = None) -> str:
    """The page; it holds everything it shows, and runs no script.

    Args:
        report: what is shown.
        folder: where the page goes; if a page of `privfl audit report` lies there, this one links
            to it.
    """
    import jinja2
    from markupsafe import Markup

    def shown(value: object) -> object:
        """Text from outside without what would garble the page; what we made ourselves as it is."""
        return (
            _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", value)
            if isinstance(value, str) and not isinstance(value, Markup)
            else value
        )

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("privfl", "reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=shown,
    )
    environment.filters |= {
        "up": up,
        "plain": plain,
        "within": within,
        "times": times,
        "moment": moment,
        "share": share,
        "one_in": one_in,
        "numbered": numbered,
        # A sum of deltas, without the noise of its last digits.
        "added": lambda delta: f"{delta:.10g}",
        "opening": lambda text: text[:1].upper() + text[1:],
        "mechanism": lambda kind: MECHANISMS.get(kind, kind),
        "records": RECORDS.__getitem__,
        "accountant": ACCOUNTANTS.__getitem__,
    }
    sites = [_site(site, number) for number, site in enumerate(report.sites, 1)]
    return environment.get_template("budget.html.j2").render(
        report=report,
        sites=sites,
        deltas=_deltas(report),
        audits=AUDITS if folder is not None and (folder / AUDITS).exists() else None,
    )


def _site(report: SiteReport, number: int) -> Site:
    charged = {charge.run for account in report.accounts for charge in account.charges}
    runs = dict.fromkeys(
        [
            *(run.run for run in report.runs),
            *(c.run for account in report.accounts for c in account.charges),
        ]
    )
    numbers = {run: i for i, run in enumerate(runs, 1)}
    key = f"site-{number}"
    return Site(
        key=key,
        report=report,
        numbers=numbers,
        charged=len(charged),
        plots=[
            _plots(report, account, numbers, key) for account in report.accounts if account.curve
        ],
        newest=next((run for run in reversed(report.runs) if run.adversaries), None),
        wrong=[check for check in report.checks if check.ok is False],
        open=[check for check in report.checks if check.ok is None],
    )


def _plots(report: SiteReport, account: Account, numbers: dict[str, int], key: str) -> Plots:
    from markupsafe import Markup

    from privfl.reporting.plots import curve_plot, runs_plot

    budget = report.budget.epsilon if report.budget is not None else None
    name = _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", report.site)
    curve = curve_plot(account, numbers, budget, name, f"{key}-{account.account}-curve")
    runs = runs_plot(account, numbers, budget, name, f"{key}-{account.account}-runs")
    return Plots(account, Markup(curve), Markup(runs))  # noqa: S704 - ours; names in it are escaped


def _deltas(report: Report) -> list[float]:
    """All deltas in the report, each once."""
    deltas = [account.delta for site in report.sites for account in site.accounts]
    deltas += [
        cost.delta
        for site in report.sites
        for run in site.runs
        for cost in (run.training, run.evaluation)
        if cost is not None
    ]
    return sorted({delta for delta in deltas if not math.isnan(delta)})


# -- numbers in words ------------------------------------------------------------------------------


def _infinite(epsilon: Epsilon) -> bool:
    return isinstance(epsilon, str) or math.isinf(epsilon)


def within(spent: Epsilon, budget: float | None) -> str:
    """What was spent, rounded up, but not beyond a budget that it does not exceed."""
    text = up(spent)
    if (
        budget is not None
        and not isinstance(spent, str)
        and spent <= budget
        and text not in ("infinite", "unknown")
        and float(text) > budget
    ):
        return plain(budget)
    return text


def times(epsilon: Epsilon) -> str:
    """e to the power of epsilon: how many times as likely a conclusion can become."""
    if isinstance(epsilon, str) or math.isinf(epsilon):
        return "no bound"
    if math.isnan(epsilon):
        return "unknown"
    # A whisker more, because exp may round down.
    factor = math.exp(min(epsilon, 100.0)) * (1.0 + 1e-12) if epsilon else 1.0
    if factor > _MILLION:
        return "more than a million"
    return f"{int(up(factor, 3)):,}" if factor >= _SEPARATED else up(factor, 3)


def share(spent: Epsilon, budget: float) -> float:
    """How much of a budget is spent, in percent, rounded up to a tenth; at most 100."""
    if isinstance(spent, str) or not math.isfinite(spent) or budget <= 0.0:
        return 100.0
    return min(math.ceil(1000.0 * spent / budget - 1e-9) / 10.0, 100.0)


def one_in(probability: float) -> str:
    """1e-05 as '1 in 100,000'; rounded to the more likely side."""
    return (
        f"1 in {math.floor(1.0 / probability + 1e-6):,}"
        if 0.0 < probability < 1.0
        else "no small chance"
    )


def numbered(runs: Sequence[Run], numbers: dict[str, int]) -> str:
    """Runs by their numbers: 'run 2', 'runs 1, 2 and 5'; of many only the first."""
    known = [str(numbers[run.run]) for run in runs]
    if len(known) == 1:
        return f"run {known[0]}"
    if len(known) > _NAMED:
        return (
            f"runs {', '.join(known[:_NAMED])} and {len(known) - _NAMED} more, which the table of "
            "runs shows,"
        )
    return f"runs {', '.join(known[:-1])} and {known[-1]}"


def moment(time: str) -> str:
    """2026-11-25T20:59:35Z as '2026-11-25 20:59:35'; all times are UTC."""
    parts = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)(?:\.\d+)?Z", time)
    return f"{parts[1]} {parts[2]}" if parts else time
