"""`privfl train`: under mpiexec one rank of a run, with --ranks the launcher of one."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from privfl import environment
from privfl.cli import launcher
from privfl.cli.help import example
from privfl.errors import PrivflError

if TYPE_CHECKING:
    from privfl.config import Experiment
    from privfl.site.observer import Observer
    from privfl.transport import Transport


@click.command(
    name="train",
    short_help="Train one model at all sites of an experiment.",
    epilog=example(
        "mpiexec -n 5 privfl train mine/experiment.yaml",
        "open report.html in the run folder, which the last line names; see also: privfl budget",
    ),
)
@click.argument("experiment", required=False, type=click.Path(path_type=Path))
@click.option(
    "--sites",
    type=click.Path(path_type=Path),
    help="Folder with one file per site, DIR/<site>.yaml; by default sites/ beside EXPERIMENT.",
)
@click.option("--no-sites", is_flag=True, help="Run without site files, also where there are some.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder in which the run folder is made."
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY.PATH=VALUE",
    help="Change one value of the experiment; may be repeated.",
)
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    help="Start this many ranks with the mpiexec that fits this environment.",
)
def command(
    experiment: Path | None,
    sites: Path | None,
    no_sites: bool,
    output: Path | None,
    settings: tuple[str, ...],
    ranks: int | None,
) -> int:
    """Train one model at all sites of EXPERIMENT, and say what that cost each in privacy.

    EXPERIMENT is a YAML file; the built-in demo if none is given. One coordinator and N sites are
    N + 1 MPI ranks. What it would cost says `privfl plan`, which trains nothing.
    """
    from privfl.config import sites_folder

    sites = sites_folder(experiment, sites, no_sites)
    if ranks is not None:
        _launch(ranks, experiment, sites, output, settings)
    from privfl.transport import mpi

    # A world of size 1 although the launcher started more: found out here, before anything else
    # goes wrong.
    transport = mpi.start()
    started = environment.launcher_size()
    if transport.size == 1 and started is not None and started > 1:
        raise PrivflError(
            f"the launcher started {started} processes, but MPI sees each of them alone; use the "
            "mpiexec of the MPI library that `privfl doctor` shows, or with Slurm `srun "
            "--mpi=pmi2` for MPICH and `srun --mpi=pmix` for Open MPI"
        )
    return run(transport, experiment, sites, output, settings, shown=shlex.join(sys.argv[1:]))


def _launch(
    ranks: int,
    experiment: Path | None,
    sites: Path | None,
    output: Path | None,
    settings: tuple[str, ...],
) -> None:
    if (environment.launcher_size() or 1) > 1:
        raise PrivflError("--ranks starts mpiexec itself; leave it out under mpiexec or srun")
    arguments = [*launcher.mpiexec_command(ranks), sys.executable, "-m", "privfl.cli", "train"]
    arguments += [str(experiment)] if experiment else []
    arguments += ["--sites", str(sites)] if sites else ["--no-sites"]
    arguments += ["--output", str(output)] if output else []
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
    observer: Observer | None = None,
) -> int:
    """One rank's part of a run over any transport; the exit code of the job.

    Args:
        transport: connects the ranks of the job.
        experiment: the experiment file; None for the built-in demo.
        sites: the folder with site files.
        output: the folder in which the run folder is made.
        settings: values that replace some of the experiment, as "key.path=value".
        shown: the arguments of the command, for advice that can be pasted.
        observer: told of what happens at this site; for tests and audits.
    """
    from privfl.config import demo_path

    path = (experiment or demo_path()).resolve()
    if transport.rank == 0:
        return _lead(transport, path, output, settings, shown)
    return _serve(transport, path, sites, settings, observer)


def _lead(
    transport: Transport, path: Path, output: Path | None, settings: tuple[str, ...], shown: str
) -> int:
    from privfl.config import load_experiment
    from privfl.coordinator.run import lead, refuse

    try:
        experiment = load_experiment(path, settings)
        needed = len(experiment.sites) + 1
        if transport.size != needed:
            how = (
                "was not started under mpiexec"
                if transport.size == 1
                else f"was started with {transport.size} ranks"
            )
            raise PrivflError(
                f"the experiment has {needed - 1} sites and needs {needed} MPI ranks (one "
                f"coordinates), but it {how}; start it with: mpiexec -n {needed} privfl {shown}"
            )
    except Exception as error:
        return refuse(transport, error)
    if output is not None:
        experiment = experiment.model_copy(update={"output": str(output)})
    return lead(transport, experiment)


def _serve(
    transport: Transport,
    path: Path,
    sites: Path | None,
    settings: tuple[str, ...],
    observer: Observer | None,
) -> int:
    from privfl.config import check_functions, load_experiment, load_site
    from privfl.site import agent
    from privfl.site.setup import SiteSetup, prepare_site

    ledgers: list[Path] = []

    def prepare() -> SiteSetup:
        experiment = load_experiment(path, settings)
        site = _site_of(transport.rank, experiment)
        check_functions(experiment, path.parent)
        file = load_site(sites, site)
        rules = None if sites is None else str(sites / f"{site}.yaml")
        setup = prepare_site(site, experiment, path.parent, file, rules)
        if file.ledger is not None:
            ledgers.append(Path(file.ledger.file))
        return setup

    code = agent.serve(transport, prepare, observer)
    if code == 0 and ledgers:
        from privfl.reporting.from_ledger import write_page

        write_page(ledgers[0])
    return code


def _site_of(rank: int, experiment: Experiment) -> str:
    named = os.environ.get("PRIVFL_SITE")
    if named is not None:
        if named not in experiment.sites:
            raise PrivflError(
                f"PRIVFL_SITE is {named!r}, which is not one of the experiment's sites: "
                f"{', '.join(experiment.sites)}"
            )
        return named
    if rank > len(experiment.sites):
        raise PrivflError(f"rank {rank} has no site; the experiment has {len(experiment.sites)}")
    return experiment.sites[rank - 1]
