"""A run on rank 0: the coordinator, the run folder and the terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from privfl.accounting import ADJACENCY, adversaries
from privfl.admission.plan import parameters_of, training_steps
from privfl.config import Experiment, to_yaml
from privfl.coordinator import driver
from privfl.environment import user_id, versions
from privfl.errors import EXIT_OURS, PrivflError, ProtocolError, in_one_line
from privfl.federation.coordinator import Plan
from privfl.federation.messages import Vector
from privfl.federation.news import (
    Greeted,
    News,
    ReadySite,
    RoundDone,
    RunFailed,
    RunFinished,
    SiteRound,
    Started,
)
from privfl.reporting import RunFolder, Terminal
from privfl.secagg.session.metrics import layout_of
from privfl.transport import Transport

PINNED, SINGLE = "pinned keys", "single trust domain"


def lead(transport: Transport, experiment: Experiment) -> int:
    """Lead one run of ``experiment`` as rank 0, with its run folder in the experiment's ``output``;
    the exit code of the job.

    Whatever is wrong is said in one sentence on standard error, and every rank is told to end.
    """
    try:
        run = _Run(transport, experiment)
    except Exception as error:
        return refuse(transport, error)
    return run.lead()


def refuse(transport: Transport, error: Exception) -> int:
    """End a job that cannot begin: one sentence on standard error, and every rank told to end;
    the exit code of the job.
    """
    ours = not isinstance(error, PrivflError)
    text = in_one_line(f"internal error: {type(error).__name__}: {error}") if ours else str(error)
    sys.stderr.write(f"privfl: {text}\n")
    return driver.dismiss(
        transport, error.exit_code if isinstance(error, PrivflError) else EXIT_OURS
    )


class _Run:
    def __init__(self, transport: Transport, experiment: Experiment) -> None:
        self._parameters = parameters_of(experiment)
        self._transport, self._experiment = transport, experiment
        self._run = os.urandom(16)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self._folder = RunFolder(
            (Path(experiment.output) / f"{stamp}-{self._run.hex()[:8]}").resolve()
        )
        self._terminal = Terminal(sys.stdout)
        self._sites: Mapping[str, ReadySite] = {}
        self._last: RoundDone | None = None
        self._adversaries: dict[str, list[float]] = {}
        self._metrics: dict[str, float] = {}
        self._seconds: dict[str, float] = {}

    def lead(self) -> int:
        experiment, parameters = self._experiment, self._parameters

        def blocks(vector: Vector, numbers: int) -> int:
            return layout_of(numbers, parameters, wide=vector == "metrics").blocks

        plan = Plan(
            run=self._run,
            folder=str(self._folder.path),
            digest=experiment.digest(),
            versions=versions(),
            sites=experiment.sites,
            rounds=experiment.rounds,
            evaluate_every=experiment.evaluate_every,
            # A step sums over records, so there a site weighs what its records do.
            weights="records" if experiment.algorithm == "fedsgd" else experiment.weights,
            shared_noise=experiment.privacy.noise == "distributed",
            blocks=blocks,
            path=experiment.secure_aggregation.path,
            user=user_id(),
        )
        self._terminal.line(
            f"starting {len(experiment.sites)} sites ({', '.join(experiment.sites)}): torch, "
            "Opacus, keys; some seconds ..."
        )
        return driver.coordinate(self._transport, plan, parameters, self._take, sys.stderr)

    def _take(self, news: News, seconds: dict[str, float]) -> None:
        for phase, more in seconds.items():
            self._seconds[phase] = self._seconds.get(phase, 0.0) + more
        match news:
            case Greeted():
                self._folder.create(self._resolved())
            case Started():
                self._started(news)
            case RoundDone():
                self._round(news, seconds)
            case RunFinished():
                self._finished(news)
            case RunFailed():
                sys.stderr.write(f"privfl: {news.error}\n")
                sys.stderr.flush()

    # -- the beginning -----------------------------------------------------------------------------

    def _resolved(self) -> str:
        head = f"# Resolved experiment of run {self._run.hex()}\n"
        return head + to_yaml(self._experiment)

    def _started(self, news: Started) -> None:
        experiment = self._experiment
        self._sites = news.sites
        # What a site announced is what it charges, all steps of the run as one event.
        self._plans = {
            name: training_steps(name, experiment)(ready.noise_multiplier)
            for name, ready in news.sites.items()
        }
        self._everybody = adversaries(
            experiment.privacy.noise, len(experiment.sites), experiment.collusion
        )
        everybody = len(news.pinned) == len(experiment.sites)
        self._trust = PINNED if everybody and news.separate_users else SINGLE
        self._aggregation = self._aggregation_of(news)
        self._terminal.started(
            self._run.hex(),
            news,
            seconds=self._seconds.get("start", 0.0),
            delta=experiment.privacy.delta,
            private=experiment.private,
            metrics=self._metrics_leave(),
            trust=self._trust,
            aggregation=self._aggregation,
            collusion=experiment.collusion,
        )

    def _metrics_leave(self) -> Literal["none", "exact", "noised"]:
        if not self._experiment.evaluate_every:
            return "none"
        return "exact" if self._experiment.evaluation.records == "public" else "noised"

    def _aggregation_of(self, news: Started) -> dict[str, Any]:
        parameters, chosen = self._parameters, self._experiment.secure_aggregation
        return {
            "keys_pinned_by": list(news.pinned),
            "encryption": "CKKS, one key per run, held by the sites",
            "masks": "pairwise",
            "value_bits": parameters.value_bits,
            "values_per_integer": parameters.fields,
            "range": self._experiment.aggregation_range,
            "rounding": chosen.rounding,
            "path": chosen.path,
            "addition": "words" if news.words_add else "evaluator",
        }

    # -- rounds ------------------------------------------------------------------------------------

    def _round(self, news: RoundDone, seconds: dict[str, float]) -> None:
        from privfl.reporting.history import now

        for name, site in news.sites.items():
            self._check_event(name, site)
            self._adversaries[name] = self._epsilons_of_adversaries(name, site)
        self._last = news
        self._metrics = dict(news.metrics) or self._metrics
        self._folder.add_round(
            {
                "run": self._run.hex(),
                "private": self._experiment.private,
                "delta": self._experiment.privacy.delta,
                "time": now(),
                "round": news.round,
                "members": list(news.members),
                "metrics": dict(news.metrics),
                "sites": {name: self._record_of(name, site) for name, site in news.sites.items()},
                **({"adopted": list(news.adopted)} if news.adopted else {}),
                "seconds": seconds,
            }
        )
        self._terminal.round_done(self._experiment.rounds, news, seconds)

    def _record_of(self, name: str, site: SiteRound) -> dict[str, Any]:
        record = asdict(site) | {"adversaries": self._adversaries[name]}
        if site.evaluation is None:
            del record["evaluation"]
        return record

    def _check_event(self, name: str, site: SiteRound) -> None:
        """A site charges what it said before the first round; a report about anything else would
        be false.
        """
        if site.event != self._plans[name].times(self._experiment.local_steps).to_dict():
            raise ProtocolError(f"site {name} reports another mechanism than it announced")

    def _epsilons_of_adversaries(self, name: str, site: SiteRound) -> list[float]:
        """Epsilon of a site's records so far, against the public, one other site, two, and so
        on; with distributed noise all by RDP.
        """
        experiment = self._experiment
        if not experiment.private:
            return []
        so_far = self._plans[name].times(site.steps)
        if experiment.privacy.noise == "site":
            return [site.epsilon for _ in self._everybody]
        return [
            adversary.epsilon([so_far], experiment.privacy.delta) for adversary in self._everybody
        ]

    # -- the end -----------------------------------------------------------------------------------

    def _finished(self, news: RunFinished) -> None:
        from privfl.reporting.build import report
        from privfl.reporting.from_rounds import histories
        from privfl.reporting.html import to_html

        summary = self._summary()
        history = histories(
            self._run.hex(), self._folder.path, self._experiment, self._sites, self._trust
        )
        page = report(f"Run {self._run.hex()[:8]}", history)
        self._folder.write_report(page.model_dump_json(indent=2) + "\n", to_html(page))
        self._folder.write_summary(summary)
        self._terminal.finished(str(self._folder.path), summary, news.sites)

    def _summary(self) -> dict[str, Any]:
        assert self._last is not None
        experiment = self._experiment
        return {
            "run": self._run.hex(),
            "private": experiment.private,
            "trust": self._trust,
            "noise": experiment.privacy.noise,
            "collusion": experiment.collusion,
            "secure_aggregation": self._aggregation,
            "adjacency": ADJACENCY,
            "sampling": "poisson",
            "rounds": self._last.round,
            "metrics": self._metrics,
            "sites": {
                name: self._site_summary(name, self._last.sites[name]) for name in self._sites
            },
            "seconds": self._seconds | {"total": sum(self._seconds.values())},
        }

    def _site_summary(self, name: str, last: SiteRound) -> dict[str, Any]:
        experiment, ready = self._experiment, self._sites[name]
        facts: dict[str, Any] = {
            "epsilon": last.epsilon,
            "delta": experiment.privacy.delta,
            "steps": last.steps,
            "noise_multiplier": ready.noise_multiplier,
            "sampling_rate": ready.sampling_rate,
            "records": ready.records,
            "weight": ready.weight,
            "accountant": ready.accountant,
            "ledger": ready.ledger,
            "outside": list(ready.outside),
        }
        if experiment.private:
            who = (adversary.who for adversary in self._everybody)
            epsilons = dict(zip(who, self._adversaries[name], strict=True))
            by = ready.accountant if experiment.privacy.noise == "site" else "rdp"
            facts["adversaries"] = {"accountant": by, "epsilon": epsilons}
        if last.evaluation is not None:
            # What all metrics with noise cost the evaluation records; they are always due in the
            # last round.
            facts["evaluation_epsilon"] = last.evaluation.epsilon
        return facts
