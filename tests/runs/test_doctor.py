"""`privfl doctor` and the entrance of the command line."""

from __future__ import annotations

from importlib.metadata import version

import click.testing

from privfl._version import __version__
from tests.conftest import PRIVFL, run_cli, run_job, train


def test_doctor_tells_what_a_run_needs():
    job = run_cli("doctor")
    assert job.code == 0, job.err
    for part in (
        f"privfl          {__version__}",
        f"tenseal         {version('tenseal')}",
        "MPICH",
        "mpiexec",
        "usable",
        "CKKS sums are exact, masks hide and cancel",
        "ciphertexts add as words",
        "all well",
    ):
        assert part in job.out


def test_doctor_finds_a_launcher_that_does_not_fit():
    job = run_job(2, ["env", "-u", "PMI_FD", "-u", "PMI_PORT", PRIVFL, "doctor"])
    assert job.code == 2
    assert job.err.count("launcher and MPI library do not fit") == 1


def test_doctor_fails_when_the_encryption_is_broken(monkeypatch):
    from privfl.cli import doctor
    from privfl.errors import PrivflError
    from privfl.secagg import masks

    monkeypatch.setattr(masks.Masks, "apply", lambda self, integers: None)
    result = click.testing.CliRunner().invoke(doctor.command)
    assert isinstance(result.exception, PrivflError)
    assert "encryption probe failed: masks hide nothing" in str(result.exception)


def test_version_and_help():
    assert run_cli("--version").out.strip() == f"privfl, version {__version__}"
    shown = run_cli("--help").out
    for command in ("train", "init", "keys", "doctor"):
        assert command in shown
    assert "mpiexec -n 5 privfl train" in shown
    assert run_cli("trian").code == 2
    assert run_cli().code == 2


def test_ranks_starts_the_matching_mpiexec(small, tmp_path):
    """They are ranks of one world; the README's test trains with it."""
    job = run_cli("train", small, "--ranks", "2", "--output", tmp_path / "o")
    assert job.code == 2
    assert (
        job.err.count("needs 3 MPI ranks (one coordinates), but it was started with 2 ranks") == 1
    )


def test_ranks_under_mpiexec_is_refused(small):
    job = train(3, small, "--ranks", "3")
    assert job.code == 2
    assert job.err.count("--ranks starts mpiexec itself") == 1
