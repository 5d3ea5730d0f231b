"""The conformance suite on every transport, and what only the wire of MPI can get wrong."""

from __future__ import annotations

import json
import sys
import threading

import pytest

from privfl.transport import Recorded, Recording, conformance, connect
from tests.conftest import in_threads, run_job, without_ptrace

pytestmark = pytest.mark.slow

NAMES = [check.__name__.removeprefix("_check_") for check in conformance.CHECKS]


def test_in_process():
    assert in_threads(connect(4), conformance.run) == [NAMES] * 4


def test_recording_changes_nothing_and_keeps_everything():
    frames: list[Recorded] = []
    lock = threading.Lock()

    def keep(recorded: Recorded) -> None:
        with lock:
            frames.append(recorded)

    assert (
        in_threads([Recording(transport, keep) for transport in connect(3)], conformance.run)
        == [NAMES] * 3
    )
    sent = sorted((r.rank, r.peer, r.head, r.bulk) for r in frames if r.sent and not r.summed)
    received = sorted((r.peer, r.rank, r.head, r.bulk) for r in frames if not r.sent)
    assert sent == received
    assert len(sent) > 800


def test_mpi():
    job = run_job(4, [sys.executable, "-m", "tests.jobs.conformance"])
    assert job.code == 0, job.err
    assert [json.loads(line) for line in job.out.splitlines()] == [NAMES] * 4


def test_mpi_between_processes_that_may_not_read_each_other():
    """Large messages too: MPICH's own way for them reads the sender's memory, which a site
    forbids.
    """
    job = run_job(3, [*without_ptrace(), sys.executable, "-m", "tests.jobs.conformance"])
    assert job.code == 0, job.err
    assert [json.loads(line) for line in job.out.splitlines()] == [NAMES] * 3


def test_the_suite_notices_a_transport_that_reads_memory():
    job = run_job(
        3,
        [*without_ptrace(), sys.executable, "-m", "tests.jobs.conformance"],
        env={"MPIR_CVAR_CH4_CMA_ENABLE": "1"},
    )
    assert job.code != 0
    assert "process_vm_readv" in job.err


def test_mpi_over_a_network_device():
    """The loopback network instead of shared memory: dropped requests and reordering show only
    there.
    """
    job = run_job(
        3,
        [sys.executable, "-m", "tests.jobs.conformance"],
        env={"MPIR_CVAR_NOLOCAL": "1", "UCX_TLS": "tcp,self"},
    )
    assert job.code == 0, job.err
    assert len(job.out.splitlines()) == 3


def test_mpi_refuses_what_is_no_message_and_what_was_damaged():
    job = run_job(2, [sys.executable, "-m", "tests.jobs.damaged_frames"])
    assert job.code == 0, job.err
    assert json.loads(job.out) == [
        "not a privfl message",
        "head too long",
        "payload too long",
        "damaged",
    ]
