"""Trainers that are threads of the test's own process: torch is loaded once, and a test can
change what a trainer does.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TextIO

from privfl.trainer import process
from privfl.trainer.channel import Channel, Closed, SharedVector
from privfl.trainer.main import Trainer, serve
from privfl.trainer.requests import ANSWERS, REQUESTS, Answer, Prepare, Request

# torch's generator and sys.modules are the process's own, so trainers get ready one after another.
_STARTING = threading.Lock()


class _Running:
    """A process that has not ended."""

    def poll(self) -> None:
        return None


class _Waiting(Trainer):
    """Gets ready when no other trainer does."""

    def answer(self, request: Request) -> Answer:
        with _STARTING if isinstance(request, Prepare) else contextlib.nullcontext():
            return super().answer(request)


class ThreadTrainer(process.TrainerProcess):
    """To an agent like any other trainer."""

    def __init__(self, site: str, threads: int, log: TextIO, prepare: Prepare) -> None:
        self._log = log.name
        self.replica, self.update = SharedVector.create(), SharedVector.create()
        self._end, theirs = socket.socketpair()
        self._channel = Channel(self._end, ANSWERS)
        self._process = _Running()  # type: ignore[assignment]
        self._thread = threading.Thread(
            target=self._serve, args=(site, Channel(theirs, REQUESTS)), name=site, daemon=True
        )
        self._thread.log = log  # type: ignore[attr-defined]
        self._thread.start()
        self.ask(prepare.model_copy(update={"threads": 1}))

    def _serve(self, site: str, channel: Channel[Request]) -> None:
        with contextlib.suppress(Closed):
            serve(channel, _Waiting(site, self.replica, self.update))
        channel.close()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)
        self._thread.join(60)
        self._channel.close()
        self.replica.close()
        self.update.close()
