"""One rank of a recorded run, under mpiexec:
`python -m privacy_audits.targets.observed FOLDER EXPERIMENT [KEY.PATH=VALUE]...`.

It runs `privfl train EXPERIMENT` and leaves what it observed in ``FOLDER/rank-K.npz``.
Sites see their own sums, shares and totals through privfl's observer; rank 0 keeps every byte that
it received.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfl.accounting import Account, Event
from privfl.errors import PrivflError
from privfl.ledger import Ledger
from privfl.site.observer import Observer
from privfl.transport import Recorded, Recording

# PR_SET_PTRACER of Linux's Yama.
_SET_PTRACER = 0x59616D61
# After how many frames the memory of rank 0 is searched: early, and in the middle of the run.
_LOOKS = (20, 200)


class Recorder(Observer):
    """Keeps, in order, what an agent tells.

    Args:
        folder: of the run, in which the ledger is.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ledger: Path | None = None
        self._lock, self._clock = threading.Lock(), itertools.count()
        self.arrays: dict[str, list[NDArray[Any]]] = {}
        # What happened when: ("charged", round, ...) and ("contributed", round, ...), in order.
        self.happened: list[dict[str, Any]] = []
        self.site = ""
        self.facts: dict[str, Any] = {}

    def keep(self, name: str, *vectors: NDArray[Any]) -> None:
        """Keep copies of ``vectors`` under one name."""
        with self._lock:
            self.arrays.setdefault(name, []).append(np.stack(vectors).copy())

    def note(self, what: str, **facts: Any) -> None:
        """Keep that something happened."""
        with self._lock:
            self.happened.append({"what": what, "order": next(self._clock), **facts})

    def began(self, site: str, algorithm: Any) -> None:
        self.site = site
        grid = getattr(algorithm, "grid", None)
        if grid is not None:
            self.facts |= {"step": grid.step, "sensitivity": grid.sensitivity}

    def charged(self, site: str, account: Account, event: Event, round_: int) -> None:
        self.note("charged", account=account, event=event.to_dict(), round=round_)

    def share_added(
        self,
        site: str,
        total: NDArray[np.float64],
        share: NDArray[np.int64],
        integers: NDArray[np.int64],
    ) -> None:
        self.keep("total", total)
        self.keep("share", share)
        self.keep("integers", integers)

    def contributed(self, site: str, round_: int, attempt: int, vector: NDArray[Any]) -> None:
        on_disk = self._charged_on_disk(site)
        self.note("contributed", round=round_, attempt=attempt, on_disk=on_disk)
        self.keep("contributed", vector)

    def _charged_on_disk(self, site: str) -> int:
        """The steps that another program finds in the ledger of ``site`` at this moment."""
        paths = [self._ledger] if self._ledger else list(self._folder.rglob("*.ledger"))
        for path in paths:
            # Another site's may be about to begin.
            with contextlib.suppress(PrivflError), Ledger.read(path) as ledger:
                if ledger.site == site:
                    self._ledger = path
                    return sum(ledger.steps("training").values())
        return 0

    def summed(self, site: str, round_: int, attempt: int, total: NDArray[Any]) -> None:
        self.keep("summed", total)

    def replica(self, site: str, round_: int, replica: NDArray[np.float32]) -> None:
        self.keep("replica", replica)

    def save(self, path: Path, exit_code: int) -> None:
        """Write everything into one file, without pickles."""
        facts = {"site": self.site, "happened": self.happened, "exit_code": exit_code, **self.facts}
        arrays = {name: np.concatenate(pieces) for name, pieces in self.arrays.items()}
        text = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
        np.savez(path, facts=text, **arrays)  # type: ignore[arg-type]


class Wire:
    """Keeps what rank 0 received, and lets its memory be searched for the sites' key.

    Args:
        recorder: keeps heads, and the bulks in one long buffer.
        secret: the file into which the site that makes the key writes it.
    """

    def __init__(self, recorder: Recorder, secret: Path) -> None:
        self._recorder, self._secret = recorder, secret
        self._frames, self._looks = 0, list(_LOOKS)

    def keep(self, frame: Recorded) -> None:
        """Keep one frame."""
        if frame.sent:
            return
        self._recorder.note(
            "received", peer=frame.peer, head=frame.head.hex(), bytes=len(frame.bulk)
        )
        self._recorder.arrays.setdefault("bulk", []).append(np.frombuffer(frame.bulk, np.uint8))
        self._frames += 1
        if self._looks and self._frames >= self._looks[0] and self._secret.exists():
            self._looks.pop(0)
            self.look()

    def look(self) -> None:
        """Have another process search the memory of this one."""
        # Where only a process's ancestors may read it, the kernel has to be told who else may.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)
        command = [sys.executable, "-m", "privacy_audits.targets.memory", str(os.getpid())]
        done = subprocess.run(
            [*command, str(self._secret)], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            self._recorder.facts.setdefault("memory", []).append(json.loads(done.stdout))


def _leave_key(path: Path) -> None:
    """Have the site that makes the run's key leave it in a file, for the audits that need it.

    The key is of this one run, on made-up records.
    """
    from privfl.secagg.session.keys import RunKeys

    make = RunKeys.make.__func__  # type: ignore[attr-defined]

    def leaving(cls: type[RunKeys], parameters: Any) -> RunKeys:
        keys: RunKeys = make(cls, parameters)
        unfinished = path.with_suffix(".part")
        unfinished.write_bytes(keys.sums.secret_bytes())
        os.replace(unfinished, path)
        return keys

    RunKeys.make = classmethod(leaving)  # type: ignore[method-assign, assignment]


def _watch_mask_keys(recorder: Recorder) -> None:
    """Keep digests of the secrets that pairs of sites exchange, and of the keys that masks use."""
    from privfl.secagg import masks
    from privfl.secagg.key_exchange import ExchangeKey
    from privfl.secagg.keystream import Keystream

    exchange = ExchangeKey.pair_key

    def keep(what: str, key: bytes) -> bytes:
        # Before the run has begun, privfl tries its masks on keys of its own.
        if recorder.site:
            recorder.facts.setdefault(what, []).append(hashlib.sha256(key).hexdigest())
        return key

    def exchanged(self: ExchangeKey, *arguments: Any) -> bytes:
        return keep("pair_keys", exchange(self, *arguments))

    def stream(key: bytes) -> Keystream:
        return Keystream(keep("mask_keys", key))

    ExchangeKey.pair_key = exchanged  # type: ignore[method-assign, assignment]
    vars(masks)["Keystream"] = stream


def main(
    arguments: Sequence[str],
    cheat: Callable[[Any, Callable[[], None]], Any] = lambda transport, note: transport,
) -> None:
    """Run one rank, and leave what it saw.

    Args:
        arguments: the folder of the run, the experiment file, and settings that change it.
        cheat: puts something around the coordinator's transport, and is given what notes that it
            did something.
    """
    from privfl.cli.train import run
    from privfl.transport import mpi

    folder, experiment, *settings = Path(arguments[0]), Path(arguments[1]), *arguments[2:]
    recorder, code = Recorder(folder), 1
    transport: Any = mpi.start()
    rank = transport.rank
    wire = Wire(recorder, folder / "secret.bin")
    if rank == 0:
        cheating = cheat(transport, lambda: recorder.note("tricked"))
        transport = Recording(cheating, wire.keep)
    else:
        _leave_key(folder / "secret.bin")
        _watch_mask_keys(recorder)
    sites = folder / "sites"
    try:
        code = run(
            transport,
            experiment,
            sites=sites if sites.exists() else None,
            output=folder / "runs",
            settings=tuple(settings),
            observer=recorder,
        )
    except PrivflError as error:
        code = error.exit_code
        sys.stderr.write(f"privfl: {error}\n")
    finally:
        if rank == 0 and (folder / "secret.bin").exists():
            wire.look()
        unfinished = folder / f".rank-{rank}.npz"
        recorder.save(unfinished, code)
        os.replace(unfinished, folder / f"rank-{rank}.npz")
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
