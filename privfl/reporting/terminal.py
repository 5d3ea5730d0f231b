"""Plain lines on rank 0: what is about to happen, one line a round, and where everything lies in
the end.

One string and one write per line, because launchers mix the output of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TextIO

from privfl.federation.news import Outputs, ReadySite, RoundDone, Started
from privfl.reporting.numbers import MEANINGLESS, decimals, meaningless


class Terminal:
    """Writes the progress of a run to ``out``."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def line(self, text: str = "") -> None:
        """One whole line."""
        self._out.write(text + "\n")
        self._out.flush()

    def started(
        self,
        run: str,
        news: Started,
        *,
        seconds: float,
        delta: float,
        private: bool,
        metrics: Literal["none", "exact", "noised"],
        trust: str,
        aggregation: Mapping[str, Any],
        collusion: int,
    ) -> None:
        """The head: who takes part, with how much noise, and what is (not) promised."""
        sites = news.sites
        self.line(
            f"run {run}: {len(sites)} sites, {news.parameters} parameters, started in "
            f"{seconds:.1f} s"
        )
        self.line(
            f"{'site':<16}{'records':>8}{'weight':>8}{'sampling rate':>15}{'noise multiplier':>18}"
            f"{'epsilon at the end':>20}"
        )
        for name, site in sites.items():
            self.line(
                f"{name:<16}{site.records:>8}{site.weight:>8.3f}{site.sampling_rate:>15.4g}"
                f"{site.noise_multiplier:>18.3f}"
                f"{decimals(site.planned_epsilon, 3):>20}"
            )
        noise = "every site adds all of its noise itself"
        if collusion:
            noise = (
                f"every site adds a share of the noise, enough if at most {collusion} of them give "
                "away what they see"
            )
        self.line(
            f"epsilon protects one record (not a person with several) at delta {delta:g}; {noise}"
        )
        self._aggregation(aggregation)
        self.line(f"trust: {trust}: {_trust(news)}")
        self._rules(sites)
        self._ledgers(sites)
        if metrics == "exact":
            self.line(
                "metrics are exact and leave the sites: right only for public evaluation records "
                "(evaluation.records)"
            )
        elif metrics == "noised":
            cost = "  ".join(
                f"{name} {decimals(site.evaluation_epsilon, 3)}" for name, site in sites.items()
            )
            self.line(
                "metrics have noise, which costs the evaluation records an epsilon of their own: "
                f"{cost}"
            )
        self._warnings(sites, delta)
        if not private:
            self.line(
                "NOT PRIVATE: insecure_test_seed is set, so the noise can be recomputed by anybody "
                "who knows it"
            )
        self.line()

    def _aggregation(self, facts: Mapping[str, Any]) -> None:
        values = "two values in a word"
        if facts["values_per_integer"] == 1:
            values = "one value in a word (two do not fit: twice the bytes)"
        self.line(
            f"updates leave a site masked and encrypted: {facts['value_bits']} bits a value, "
            f"{values}"
        )
        if facts["addition"] == "evaluator":
            self.line(
                "ciphertexts are added with TenSEAL's evaluator, slowly: this TenSEAL is not "
                "proven to let their words be added"
            )

    def _warnings(self, sites: Mapping[str, ReadySite], delta: float) -> None:
        for name, site in sites.items():
            if site.planned_epsilon > MEANINGLESS:
                self.line(meaningless(name, site.planned_epsilon))
        for name, site in sites.items():
            if delta * site.records >= 1.0:
                self.line(
                    f"WARNING: delta {delta:g} is not below 1 / records of {name}: it would allow "
                    "publishing one of its records whole"
                )
        for text in sorted({text for site in sites.values() for text in site.outside}):
            who = ", ".join(name for name, site in sites.items() if text in site.outside)
            self.line(f"WARNING: outside the guarantee at {who}: {text}")

    def _rules(self, sites: Mapping[str, ReadySite]) -> None:
        given = [f"{site.rules} ({name})" for name, site in sites.items() if site.rules is not None]
        without = [name for name, site in sites.items() if site.rules is None]
        if given:
            self.line(f"site files: {', '.join(given)}")
        if without:
            who = "" if not given else f" at {', '.join(without)}"
            self.line(f"no site file{who}: no rules of a data owner, and no budget, bind this run")

    def _ledgers(self, sites: Mapping[str, ReadySite]) -> None:
        keepers = {name: site.ledger for name, site in sites.items() if site.ledger != "none"}
        if keepers:
            new = {
                name: " (begins with this run)" if ledger == "new" else ""
                for name, ledger in keepers.items()
            }
            self.line(
                "a ledger is kept across runs by "
                + ", ".join(name + text for name, text in new.items())
            )
        if len(keepers) < len(sites):
            who = (
                " at " + ", ".join(name for name in sites if name not in keepers) if keepers else ""
            )
            self.line(
                f"no ledger is kept across runs{who}: earlier runs on these records are not in "
                "these epsilons; a ledger and a budget in the site file would count them"
            )

    def round_done(self, rounds: int, news: RoundDone, seconds: Mapping[str, float]) -> None:
        """One line: round, members, metrics, epsilons, seconds."""
        metrics = "  ".join(
            f"{name} {value:.4f}"
            for name, value in news.metrics.items()
            if not name.endswith("_mean_over_sites")
        )
        epsilons = "  ".join(
            f"{name} {decimals(site.epsilon, 3)}" for name, site in news.sites.items()
        )
        phases = "  ".join(f"{name} {value:.2f}" for name, value in seconds.items())
        parts = [
            f"round {news.round:>{len(str(rounds))}}/{rounds}",
            f"{len(news.members)}/{len(news.sites)} sites",
            metrics,
            f"epsilon: {epsilons}",
            f"seconds: {phases}",
        ]
        self.line(" | ".join(part for part in parts if part))

    def finished(
        self, folder: str, summary: Mapping[str, Any], written: Mapping[str, Outputs]
    ) -> None:
        """The result; the last line is 'run folder: PATH'."""
        self.line()
        for name, value in summary["metrics"].items():
            self.line(f"{name}: {value:.4f}")
        for name, site in summary["sites"].items():
            self.line(
                f"epsilon of {name}: {decimals(site['epsilon'])} at delta {site['delta']:g} after "
                f"{site['steps']} steps"
            )
        if not summary["private"]:
            self.line("NOT PRIVATE: insecure_test_seed was set")
        elif k := summary["collusion"]:
            # Of every adversary the epsilon at the site where it learns most, from the public to
            # all other sites together.
            of_sites = [
                list(site["adversaries"]["epsilon"].values()) for site in summary["sites"].values()
            ]
            worst = [decimals(max(epsilons)) for epsilons in zip(*of_sites, strict=True)]
            self.line(
                f"by RDP, as a plan fixed in advance: against the public {worst[0]}, against {k} "
                f"of the other sites {worst[k]}, against all others together {worst[-1]} "
                "(report.html has all)"
            )
        for name, paths in written.items():
            self.line(f"site {name}: model {paths.model}, log {paths.log}")
        self.line(f"run folder: {folder}")


def _trust(news: Started) -> str:
    """Who could read what, from what the sites have pinned and the accounts they run under."""
    if not news.pinned:
        return "whoever owns the account that runs this can read the records of all sites"
    everybody = len(news.pinned) == len(news.sites)
    who = "every site" if everybody else f"only {', '.join(news.pinned)}"
    if not news.separate_users:
        return (
            f"{who} has pinned the keys of the others, but several parties run under one account, "
            "whose owner can read all their records"
        )
    if everybody:
        return "every site knows the keys of all others, and each runs under an account of its own"
    return f"{who} has pinned the keys of the others; all must"
