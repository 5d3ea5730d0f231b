"""Starting, asking and ending a site's trainer, as its agent does it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from typing import TextIO

from privfl.errors import InternalError, PrivflError
from privfl.trainer.channel import Channel, Closed, SharedVector
from privfl.trainer.requests import ANSWERS, Answer, Failed, Prepare, Request

# Variables in which launchers describe a rank. A child that inherits them may be taken for the
# rank, by MPI or by a library.
_LAUNCHER_PREFIXES = (
    "PMI",
    "PMIX",
    "OMPI_",
    "OPAL_",
    "ORTE_",
    "PRTE_",
    "HYDI_",
    "HYDRA_",
    "MPI_LOCAL",
    "MPICH_",
    "MPIR_",
    "PALS_",
    "I_MPI_",
    "MV2_",
    "SLURM_MPI",
    "SLURM_PMI",
)
_GRACE_SECONDS = 5.0
# What starts a trainer; the site and the numbers of its descriptors follow.
COMMAND: tuple[str, ...] = (sys.executable, "-m", "privfl.trainer.main")


def trainer_environment(environment: dict[str, str], threads: int) -> dict[str, str]:
    """The agent's ``environment`` without the launcher's variables; with ``threads`` as the number
    of OpenMP threads unless it has one.
    """
    inherited = {
        name: value
        for name, value in environment.items()
        if not name.startswith(_LAUNCHER_PREFIXES)
    }
    return inherited | {"OMP_NUM_THREADS": inherited.get("OMP_NUM_THREADS") or str(threads)}


class TrainerProcess:
    """A running trainer.

    Args:
        site: the name of the site.
        threads: OpenMP threads, unless the environment says how many.
        log: where the trainer's output goes; sentences about its end refer to it.
        prepare: the first request, which is sent at once.

    Attributes:
        replica: the shared vector that the agent writes and the trainer reads.
        update: the shared vector that the trainer writes and the agent reads.
    """

    def __init__(self, site: str, threads: int, log: TextIO, prepare: Prepare) -> None:
        self._log = log.name
        self.replica = SharedVector.create()
        self.update = SharedVector.create()
        agent_end, trainer_end = socket.socketpair()
        # The trainer ends as soon as this pipe closes, however the agent died.
        alive, self._alive = os.pipe()
        passed = (trainer_end.fileno(), alive, self.replica.descriptor, self.update.descriptor)
        # A fresh interpreter and never a fork: MPI and TenSEAL do not survive one.
        self._process = subprocess.Popen(
            [*COMMAND, site, *map(str, passed)],
            pass_fds=passed,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=trainer_environment(dict(os.environ), threads),
            # A group of its own, so that what user code starts can be ended with it.
            start_new_session=True,
        )
        trainer_end.close()
        os.close(alive)
        self._channel = Channel(agent_end, ANSWERS)
        self.ask(prepare)

    def fileno(self) -> int:
        """A descriptor that is readable when the trainer answered or ended."""
        return self._channel.fileno()

    def has_answer(self) -> bool:
        """Whether :meth:`answer` returns or raises without waiting: an answer came, or the trainer
        died and none will.
        """
        return (
            bool(select.select([self._channel], [], [], 0)[0]) or self._process.poll() is not None
        )

    def ask(self, request: Request) -> None:
        """Send a request; the answer is read with :meth:`answer`."""
        # If the trainer ended, reading its answer says so, and says why.
        with contextlib.suppress(Closed):
            self._channel.send(request)

    def answer(self) -> Answer:
        """Wait for the trainer's next answer.

        Raises:
            PrivflError: If the trainer reports a failure that the user can mend, or died.
            InternalError: If it reports any other failure, or sent no message of the protocol.
        """
        try:
            if (
                self._process.poll() is not None
                and not select.select([self._channel], [], [], 0)[0]
            ):
                raise Closed
            answer = self._channel.receive()
        except Closed:
            raise self._why_it_ended() from None
        if isinstance(answer, Failed):
            kind = PrivflError if answer.exit_code == PrivflError.exit_code else InternalError
            raise kind(answer.error)
        return answer

    def _why_it_ended(self) -> PrivflError:
        """The error for an answer that will never come."""
        try:
            code = self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return InternalError(f"the trainer closed its channel but still runs; see {self._log}")
        if code < 0:
            name = (
                signal.Signals(-code).name
                if -code in signal.Signals._value2member_map_
                else str(-code)
            )
            hint = " (perhaps out of memory)" if -code == signal.SIGKILL else ""
            return PrivflError(f"the trainer was killed by signal {name}{hint}; see {self._log}")
        return PrivflError(f"the trainer ended by itself with code {code}; see {self._log}")

    def stop(self) -> None:
        """End the trainer and whatever processes user code started; a model file that it was
        writing is complete or missing, never cut off.
        """
        # The group outlives its leader while any of its processes lives, so this reaches the
        # children of a trainer that died.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._channel.close()
        os.close(self._alive)
        self.replica.close()
        self.update.close()
