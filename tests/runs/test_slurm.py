"""Under a real Slurm: the launcher that starts silent worlds of size 1, and those that work."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from privfl.cli import launcher
from tests.conftest import PRIVFL, ROOT, Job

ONE_BOX = Path(
    os.environ.get("ONE_BOX_SLURM") or ROOT.parent / "shared" / "slurm" / "one-box-slurm"
)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a Slurm cluster of four nodes on this machine."""
    if shutil.which("srun") is None or shutil.which("slurmctld") is None:
        pytest.skip("Slurm is not installed (Debian: slurm-wlm)")
    if not ONE_BOX.exists():
        pytest.skip(
            "the script that starts a one-machine Slurm is not here: set ONE_BOX_SLURM to it"
        )
    base = tmp_path_factory.mktemp("slurm")
    started = subprocess.run(
        [str(ONE_BOX), "start", str(base)], capture_output=True, text=True, timeout=60, check=False
    )
    assert started.returncode == 0, started.stderr
    yield {"SLURM_CONF": str(base / "slurm.conf")}
    subprocess.run([str(ONE_BOX), "stop", str(base)], timeout=60, check=False)


@pytest.fixture
def pmi2(slurm: dict[str, str]) -> dict[str, str]:
    """The same for `srun --mpi=pmi2`, with what the README exports: over UCX, MPICH may write
    lines longer than Slurm reads, and hang.
    """
    return slurm | {"MPIR_CVAR_CH4_NETMOD": "ofi"}


def start(environment: dict[str, str], *words: str | Path) -> Job:
    done = subprocess.run(
        [*map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=150,
        check=False,
    )
    return Job(done.returncode, done.stdout, done.stderr)


def test_srun_without_mpi_is_told_once(slurm: dict[str, str], small: Path, tmp_path: Path):
    job = start(slurm, "srun", "-n", "3", PRIVFL, "train", small, "--output", tmp_path / "o")
    said = [line for line in job.err.splitlines() if "privfl: " in line]
    assert len(said) == 1, job.err
    assert "the launcher started 3 processes, but MPI sees each of them alone" in said[0]
    assert "srun --mpi=pmi2" in said[0]
    assert job.code == 2


def test_srun_with_pmi2_trains(pmi2: dict[str, str], small: Path, tmp_path: Path):
    job = start(
        pmi2,
        "srun",
        "--mpi=pmi2",
        "-N",
        "3",
        "-n",
        "3",
        PRIVFL,
        "train",
        small,
        "--output",
        tmp_path / "o",
    )
    assert job.code == 0, job.err
    assert (job.folder / "summary.json").exists()


def test_mpiexec_in_an_allocation_trains(slurm: dict[str, str], small: Path, tmp_path: Path):
    mpiexec = launcher.mpiexec_command(3)
    job = start(
        slurm,
        "salloc",
        "-N",
        "3",
        "-n",
        "3",
        *mpiexec,
        PRIVFL,
        "train",
        small,
        "--output",
        tmp_path / "o",
    )
    assert job.code == 0, job.err
    assert (job.folder / "summary.json").exists()


def test_srun_errors_are_told_once_with_code_2(pmi2: dict[str, str], small: Path, tmp_path: Path):
    job = start(
        pmi2,
        "srun",
        "--mpi=pmi2",
        "-n",
        "3",
        PRIVFL,
        "train",
        small,
        "--output",
        tmp_path / "o",
        "--set",
        "sampling_rate=2",
    )
    assert job.err.count("privfl: ") == 1, job.err
    assert job.code == 2
