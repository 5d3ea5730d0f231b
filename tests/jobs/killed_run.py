"""A whole federation in one process that kills itself at the N-th point around what site aa
writes into its ledger and sends.

    python -m tests.jobs.killed_run EXPERIMENT SITES OUTPUT LEFT N

LEFT is a file to which every message of aa that depends on its records is noted, on the disk, just
before it leaves. With N = 0 nothing is killed, and the number of points is printed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from privfl.federation.messages import Kind, decode
from privfl.ledger.storage import Storage
from privfl.site import agent
from tests.conftest import run_twin
from tests.trainers import ThreadTrainer

LOCK = threading.Lock()


class Points:
    """Counts points, and dies at one of them without any chance to clean up."""

    def __init__(self, last: int) -> None:
        self.count, self._last = 0, last

    def pass_(self) -> None:
        with LOCK:
            self.count += 1
            if self.count == self._last:
                os.kill(os.getpid(), signal.SIGKILL)


class Watched:
    """SQLite's connection, with a point before and after every statement."""

    def __init__(self, inner: Any, points: Points) -> None:
        self._inner, self._points = inner, points

    def execute(self, *arguments: Any) -> Any:
        self._points.pass_()
        result = self._inner.execute(*arguments)
        self._points.pass_()
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Noted:
    """A rank's transport that notes what leaves site aa."""

    def __init__(self, inner: Any, left: int, points: Points) -> None:
        self._inner, self._left, self._points = inner, left, points

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def send(self, to: int, head: bytes, bulk: Any) -> None:
        message = decode(head, bulk)
        if self._inner.rank != 1 or message.kind not in (Kind.TRAINED, Kind.CONTRIBUTION):
            self._inner.send(to, head, bulk)
            return
        self._points.pass_()
        # The second attempt of a round is the sum of metrics.
        account = "evaluation" if message.attempt == 2 else "training"
        os.write(
            self._left, (json.dumps([message.run.hex(), message.round, account]) + "\n").encode()
        )
        os.fsync(self._left)
        self._points.pass_()
        self._inner.send(to, head, bulk)
        self._points.pass_()


def main(experiment: str, sites: str, output: str, left: str, last: str) -> None:
    points, add = Points(int(last)), Storage.add
    descriptor = os.open(left, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def watched(self: Storage, rows: Any) -> None:
        if self.path.name == "aa.ledger" and not isinstance(self._connection, Watched):
            self._connection = Watched(self._connection, points)
        add(self, rows)

    Storage.add = watched
    # They die with the process, as trainers do with their agents.
    agent.TrainerProcess = ThreadTrainer  # type: ignore[misc]
    settings = (
        "evaluation={metrics: {accuracy: 'task.py:accuracy'}, target_epsilon: 1, every: 1}",
        "secure_aggregation.range=4",
    )
    twin = run_twin(
        Path(experiment),
        *settings,
        output=Path(output),
        ranks=3,
        sites=Path(sites),
        wrap=lambda transport: Noted(transport, descriptor, points),
    )
    sys.stdout.write(
        json.dumps(
            {"codes": [str(code) for code in twin.codes], "points": points.count, "err": twin.err}
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
