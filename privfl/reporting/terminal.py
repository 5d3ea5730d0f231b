"""Plain lines on rank 0: what is about to happen, one line a round, and where everything lies in the end.

One string and one write per line, because launchers mix the output of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TextIO

from privfl.accounting import ADJACENCY


class Terminal:
    """Writes the progress of a run to ``out``."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def line(self, text: str = "") -> None:
        """One whole line."""
        self._out.write(text + "\n")
        self._out.flush()

    def started(self, run: str, facts: Mapping[str, Any], delta: float, *, private: bool, public_metrics: bool) -> None:
        """The head: who takes part, with how much noise, and what is (not) promised."""
        sites = facts["sites"]
        self.line(
            f"run {run}: {len(sites)} sites, {facts['parameters']} parameters, started in {facts['seconds'].get('start', 0.0):.1f} s"
        )
        self.line(f"{'site':<16}{'records':>8}{'weight':>8}{'rate q':>9}{'noise':>8}  epsilon at the end")
        for name, site in sites.items():
            self.line(
                f"{name:<16}{site['records']:>8}{site['weight']:>8.3f}{site['sampling_rate']:>9.4g}{site['noise_multiplier']:>8.3f}"
                f"  {site['planned_epsilon']:.3f}"
            )
        self.line(f"unit: one record, {ADJACENCY}; Poisson sampling; delta {delta:g}; accountant: RDP; noise: full at every site")
        self.line("trust: single trust domain (this launcher's account can read every process); no book is kept across runs")
        for name, site in sites.items():
            if delta * site["records"] >= 1.0:
                self.line(
                    f"WARNING: delta {delta:g} is not below 1 / records of {name}: it would allow publishing one of its records whole"
                )
        if public_metrics:
            self.line("metrics are exact: the experiment declares the held-out records public")
        if not private:
            self.line("NOT PRIVATE: insecure_test_seed is set, so the noise can be recomputed by anybody who knows it")
        self.line()

    def round_done(self, rounds: int, record: Mapping[str, Any]) -> None:
        """One line: round, members, metrics, epsilons, seconds."""
        metrics = "  ".join(
            f"{name} {value:.4f}" for name, value in record["metrics"].items() if not name.endswith("_mean_over_sites")
        )
        epsilons = "  ".join(f"{name} {site['epsilon']:.3f}" for name, site in record["sites"].items())
        seconds = "  ".join(f"{name} {value:.2f}" for name, value in record["seconds"].items())
        sites = f"{len(record['members'])}/{len(record['sites'])} sites"
        parts = [
            f"round {record['round']:>{len(str(rounds))}}/{rounds}",
            sites,
            metrics,
            f"epsilon: {epsilons}",
            f"s: {seconds}",
        ]
        self.line(" | ".join(part for part in parts if part))

    def finished(self, folder: str, summary: Mapping[str, Any], written: Mapping[str, Mapping[str, str]]) -> None:
        """The result; the last line is 'run folder: PATH'."""
        self.line()
        for name, value in summary["metrics"].items():
            self.line(f"{name}: {value:.4f}")
        for name, site in summary["sites"].items():
            self.line(f"epsilon of {name}: {site['epsilon']:.4f} at delta {site['delta']:g} after {site['steps']} steps")
        for name, paths in written.items():
            self.line(f"site {name}: model {paths['model']}, log {paths['log']}")
        self.line(f"run folder: {folder}")
