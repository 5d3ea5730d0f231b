"""`privfl train`: under mpiexec one rank of a run, with --ranks the launcher of one."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from privfl.cli import launcher
from privfl.errors import EXIT_OURS, InternalError, PrivflError, ProtocolError, in_one_line

if TYPE_CHECKING:
    from privfl.config import Experiment
    from privfl.reporting.history import History
    from privfl.transport import Transport


@click.command(name="train")
@click.argument("experiment", required=False, type=click.Path(path_type=Path))
@click.option("--sites", type=click.Path(path_type=Path), help="Folder with one file per site, DIR/<site>.yaml.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder in which the run folder is made.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY.PATH=VALUE",
    help="Change one value of the experiment; may be repeated.",
)
@click.option("--ranks", type=click.IntRange(min=1), help="Start this many ranks with the mpiexec that fits this environment.")
def command(
    experiment: Path | None, sites: Path | None, output: Path | None, settings: tuple[str, ...], ranks: int | None
) -> int:
    """Train one model at all sites of EXPERIMENT (a YAML file; the built-in demo if none is given).

    One coordinator and N sites are N + 1 MPI ranks:

        mpiexec -n 5 privfl train experiment.yaml
    """
    if ranks is not None:
        _launch(ranks, experiment, sites, output, settings)
    from privfl.transport import mpi

    # A world of size 1 although the launcher started more: found out here, before anything else goes wrong.
    transport = mpi.start()
    started = launcher.size_by_environment()
    if transport.size == 1 and started is not None and started > 1:
        raise PrivflError(
            f"the launcher started {started} processes, but MPI sees each of them alone; use the mpiexec of the MPI library that `privfl doctor` "
            "shows, or with Slurm `srun --mpi=pmi2` for MPICH and `srun --mpi=pmix` for Open MPI"
        )
    return run(transport, experiment, sites, output, settings, shown=shlex.join(sys.argv[1:]))


def _launch(ranks: int, experiment: Path | None, sites: Path | None, output: Path | None, settings: tuple[str, ...]) -> None:
    if (launcher.size_by_environment() or 1) > 1:
        raise PrivflError("--ranks starts mpiexec itself; leave it out under mpiexec or srun")
    arguments = [*launcher.mpiexec_command(ranks), sys.executable, "-m", "privfl.cli", "train"]
    arguments += [str(experiment)] if experiment else []
    for option, value in (("--sites", sites), ("--output", output)):
        arguments += [option, str(value)] if value else []
    for setting in settings:
        arguments += ["--set", setting]
    os.execv(arguments[0], arguments)  # noqa: S606  (an argument list of our own)


def run(
    transport: Transport,
    experiment: Path | None,
    sites: Path | None = None,
    output: Path | None = None,
    settings: tuple[str, ...] = (),
    shown: str = "train",
) -> int:
    """One rank's part of a run over any transport; the exit code of the job."""
    from privfl.config import demo_path

    path = (experiment or demo_path()).resolve()
    if transport.rank == 0:
        return _lead(transport, path, output, settings, shown=shown)
    return _serve(transport, path, sites, settings)


def _serve(transport: Transport, path: Path, sites: Path | None, settings: tuple[str, ...]) -> int:
    from privfl.config import check_functions, load_experiment, load_site
    from privfl.site import agent
    from privfl.site.setup import SiteSetup, prepare_site

    prepared: list[SiteSetup] = []

    def prepare() -> SiteSetup:
        experiment = load_experiment(path, settings)
        site = _site_of(transport.rank, experiment)
        check_functions(experiment, path.parent)
        prepared.append(prepare_site(site, experiment, path.parent, load_site(sites, site)))
        return prepared[0]

    code = agent.serve(transport, prepare)
    if code == 0 and prepared[0].file.ledger is not None:
        from privfl.reporting.from_rounds import write_page

        write_page(Path(prepared[0].file.ledger.file))
    return code


def _site_of(rank: int, experiment: Experiment) -> str:
    named = os.environ.get("PRIVFL_SITE")
    if named is not None:
        if named not in experiment.sites:
            raise PrivflError(
                f"PRIVFL_SITE is {named!r}, which is not one of the experiment's sites: {', '.join(experiment.sites)}"
            )
        return named
    if rank > len(experiment.sites):
        raise PrivflError(f"rank {rank} has no site; the experiment has {len(experiment.sites)}")
    return experiment.sites[rank - 1]


def _lead(transport: Transport, path: Path, output: Path | None, settings: tuple[str, ...], shown: str) -> int:
    from privfl.config import load_experiment
    from privfl.coordinator import driver

    try:
        experiment = load_experiment(path, settings)
        needed = len(experiment.sites) + 1
        if transport.size != needed:
            how = "was not started under mpiexec" if transport.size == 1 else f"was started with {transport.size} ranks"
            raise PrivflError(
                f"the experiment has {needed - 1} sites and needs {needed} MPI ranks (one coordinates), but it {how}; "
                f"start it with: mpiexec -n {needed} privfl {shown}"
            )
        leader = _Leader(transport, experiment, output or Path(experiment.output))
    except PrivflError as error:
        sys.stderr.write(f"privfl: {error}\n")
        return driver.dismiss(transport, error.exit_code)
    except Exception as error:
        sys.stderr.write(f"privfl: {in_one_line(f'internal error: {type(error).__name__}: {error}')}\n")
        return driver.dismiss(transport, EXIT_OURS)
    return leader.run()


class _Leader:
    """The run on rank 0: the coordinator, the run folder and the terminal."""

    def __init__(self, transport: Transport, experiment: Experiment, output: Path) -> None:
        from privfl.reporting import RunFolder, Terminal
        from privfl.site.setup import parameters_of

        self._parameters = parameters_of(experiment)
        self._transport = transport
        self._experiment = experiment
        self._run = os.urandom(16)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self._folder = RunFolder((output / f"{stamp}-{self._run.hex()[:8]}").resolve())
        self._terminal = Terminal(sys.stdout)
        self._sites: dict[str, Any] = {}
        self._last: dict[str, Any] = {}
        self._metrics: dict[str, float] = {}
        self._seconds: dict[str, float] = {}

    def run(self) -> int:
        from privfl.coordinator import driver
        from privfl.federation.coordinator import Plan
        from privfl.federation.messages import Vector
        from privfl.secagg.session.sums import layout_of
        from privfl.site.setup import account, versions

        experiment, parameters = self._experiment, self._parameters

        def blocks(vector: Vector, numbers: int) -> int:
            return layout_of(vector, numbers, parameters).blocks

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
            account=account(),
        )
        self._terminal.line(
            f"starting {len(experiment.sites)} sites ({', '.join(experiment.sites)}): torch, Opacus, keys; some seconds ..."
        )
        return driver.coordinate(self._transport, plan, parameters, self._tell, sys.stderr)

    def _tell(self, what: str, facts: dict[str, Any]) -> None:
        for phase, seconds in facts["seconds"].items():
            self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
        match what:
            case "greeted":
                self._folder.create(self._resolved())
            case "started":
                self._sites = facts["sites"]
                self._trust, self._adding = self._facts_of_aggregation(facts)
                private, delta = self._experiment.private, self._experiment.privacy.delta
                self._terminal.started(
                    self._run.hex(),
                    {**facts, "seconds": self._seconds},
                    delta,
                    private=private,
                    metrics=self._metrics_leave(),
                    trust=self._trust,
                    adding=self._adding,
                    collusion=self._experiment.collusion,
                )
            case "round":
                self._round(facts)
            case "finished":
                from privfl.reporting.build import report
                from privfl.reporting.html import to_html

                summary = self._summary()
                found = report(f"Run {self._run.hex()[:8]}", self._histories())
                self._folder.write_report(found.model_dump_json(indent=2) + "\n", to_html(found))
                self._folder.write_summary(summary)
                self._terminal.finished(str(self._folder.path), summary, facts["sites"])
            case "failed":
                sys.stderr.write(f"privfl: {facts['error']}\n")
                sys.stderr.flush()
            case _:
                raise InternalError(f"unknown news: {what}")

    def _metrics_leave(self) -> Literal["none", "exact", "noised"]:
        if not self._experiment.evaluate_every:
            return "none"
        return "exact" if self._experiment.evaluation.records == "public" else "noised"

    def _facts_of_aggregation(self, facts: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        from privfl.secagg.session.roster import PINNED, SINGLE

        parameters, chosen = self._parameters, self._experiment.secure_aggregation
        everybody = len(facts["pinned"]) == len(self._experiment.sites)
        return PINNED if everybody and facts["accounts"] else SINGLE, {
            "keys_pinned_by": facts["pinned"],
            "encryption": "CKKS, one key per run, held by the sites",
            "masks": "pairwise",
            "value_bits": parameters.value_bits,
            "values_per_integer": parameters.fields,
            "range": self._experiment.aggregation_range,
            "rounding": chosen.rounding,
            "path": chosen.path,
            "addition": "words" if facts["words_add"] else "evaluator",
        }

    def _resolved(self) -> str:
        import yaml

        head = f"# Resolved experiment of run {self._run.hex()}\n"
        return head + yaml.safe_dump(self._experiment.model_dump(mode="json"), sort_keys=False)

    def _check_event(self, name: str, event: dict[str, Any]) -> None:
        """A site charges what it said before the first round; a report about anything else would be false."""
        from privfl.admission.plan import training_steps

        site = self._sites[name]
        step = training_steps(name, self._experiment)(site["noise_multiplier"])
        if event != step.times(self._experiment.local_steps).to_dict():
            raise ProtocolError(f"site {name} reports another mechanism than it announced")

    def _epsilons_of(self, name: str, told: dict[str, Any]) -> list[float]:
        """Epsilon of a site's records so far against the public, one other site, two, and so on; with distributed noise by RDP, all of them."""
        from privfl.accounting import adversaries
        from privfl.admission.plan import training_steps

        experiment = self._experiment
        if not experiment.private:
            return []
        so_far = training_steps(name, experiment)(self._sites[name]["noise_multiplier"]).times(told["steps"])
        found = adversaries(experiment.privacy.noise, len(experiment.sites), experiment.collusion)
        delta = experiment.privacy.delta
        return [
            told["epsilon"] if experiment.privacy.noise == "site" else adversary.epsilon([so_far], delta) for adversary in found
        ]

    def _round(self, facts: dict[str, Any]) -> None:
        from privfl.reporting.history import now

        for name, site in facts["sites"].items():
            self._check_event(name, site["event"])
            site["adversaries"] = self._epsilons_of(name, site)
        self._last = facts
        self._metrics = facts["metrics"] or self._metrics
        self._folder.add_round(
            {
                "run": self._run.hex(),
                "private": self._experiment.private,
                "delta": self._experiment.privacy.delta,
                "time": now(),
                **facts,
            }
        )
        self._terminal.round_done(self._experiment.rounds, facts)

    def _histories(self) -> list[History]:
        from privfl.reporting.from_rounds import histories

        return histories(self._run.hex(), self._folder.path, self._experiment, self._sites, self._trust)

    def _evaluation_of(self, name: str) -> dict[str, float]:
        """What all metrics with noise cost a site's held-out records; they are always due in the last round."""
        cost = self._last["sites"][name].get("evaluation")
        return {"evaluation_epsilon": cost["epsilon"]} if cost else {}

    def _adversaries(self, name: str, accountant: str) -> dict[str, Any]:
        """Who could learn how much of a site's training records."""
        from privfl.accounting import adversaries

        privacy, epsilons = self._experiment.privacy, self._last["sites"][name]["adversaries"]
        if not self._experiment.private:
            return {}
        seen = adversaries(privacy.noise, len(self._experiment.sites), self._experiment.collusion)
        by = accountant if privacy.noise == "site" else "rdp"
        return {
            "adversaries": {"accountant": by, "epsilon": dict(zip((adversary.who for adversary in seen), epsilons, strict=True))}
        }

    def _summary(self) -> dict[str, Any]:
        from privfl.accounting import ADJACENCY

        experiment = self._experiment
        sites = {
            name: {
                "epsilon": self._last["sites"][name]["epsilon"],
                "delta": experiment.privacy.delta,
                "steps": self._last["sites"][name]["steps"],
                "noise_multiplier": facts["noise_multiplier"],
                "sampling_rate": facts["sampling_rate"],
                "records": facts["records"],
                "weight": facts["weight"],
                "accountant": facts["accountant"],
                "book": facts["book"],
                "outside": facts["outside"],
            }
            | self._adversaries(name, facts["accountant"])
            | self._evaluation_of(name)
            for name, facts in self._sites.items()
        }
        return {
            "run": self._run.hex(),
            "private": experiment.private,
            "trust": self._trust,
            "noise": experiment.privacy.noise,
            "collusion": experiment.collusion,
            "secure_aggregation": self._adding,
            "adjacency": ADJACENCY,
            "sampling": "poisson",
            "rounds": self._last["round"],
            "metrics": self._metrics,
            "sites": sites,
            "seconds": self._seconds | {"total": sum(self._seconds.values())},
        }
