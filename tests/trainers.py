"""Trainers that are threads of the test's own process: torch is loaded once, and a test can change what a trainer does."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any, TextIO

from privfl.errors import EXIT_OURS, EXIT_USER, PrivflError, in_one_line
from privfl.trainer import process
from privfl.trainer.channel import Closed, Link, SharedVector
from privfl.trainer.main import _Trainer

# torch's generator and sys.modules are the process's own, so trainers get ready one after another.
_STARTING = threading.Lock()


class _Running:
    def poll(self) -> None:
        return None


class ThreadTrainer(process.Trainer):
    """To an agent like any other trainer."""

    def __init__(self, site: str, threads: int, log: TextIO, setup: dict[str, Any]) -> None:
        self._log = log.name
        self.replica, self.update = SharedVector.create(), SharedVector.create()
        ours, theirs = socket.socketpair()
        self._link, self._process = Link(ours), _Running()  # type: ignore[assignment]
        self._thread = threading.Thread(target=self._serve, args=(site, Link(theirs)), daemon=True)
        self._thread.start()
        self.ask(setup | {"threads": 1})

    def _serve(self, site: str, link: Link) -> None:
        trainer: _Trainer | None = None
        with contextlib.suppress(Closed):
            while True:
                request = link.receive()
                try:
                    if trainer is None:
                        with _STARTING:
                            trainer = _Trainer(site, request, self.replica, self.update)
                        answer = trainer.facts()
                    else:
                        answer = trainer.serve(request)
                except Exception as error:
                    code = EXIT_USER if isinstance(error, PrivflError) else EXIT_OURS
                    answer = {"failed": in_one_line(str(error)), "exit_code": code}
                link.send(answer)
        link.close()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._link._end.shutdown(socket.SHUT_RDWR)
        self._thread.join(60)
        self._link.close()
        self.replica.close()
        self.update.close()
