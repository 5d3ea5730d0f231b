"""A run of fedsgd, looked at from inside: sums, noise, integers, totals and replicas of every
site.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfl.federation.messages import Kind, decode
from privfl.site.observer import Observer
from privfl.transport import Recorded, Recording


@dataclass
class Seen(Observer):
    """What every site did, round by round."""

    sums: dict[str, list[NDArray[np.float64]]] = field(default_factory=lambda: defaultdict(list))
    noise: dict[str, list[NDArray[np.int64]]] = field(default_factory=lambda: defaultdict(list))
    integers: dict[str, list[NDArray[np.int64]]] = field(default_factory=lambda: defaultdict(list))
    totals: dict[str, list[NDArray[np.int64]]] = field(default_factory=lambda: defaultdict(list))
    replicas: dict[str, list[NDArray[np.float32]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    algorithms: dict[str, Any] = field(default_factory=dict)
    wire: list[Recorded] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def wrap(self, transport: Any) -> Recording:
        return Recording(transport, self._keep)

    def _keep(self, recorded: Recorded) -> None:
        with self.lock:
            self.wire.append(recorded)

    def began(self, site: str, algorithm: Any) -> None:
        self.algorithms[site] = algorithm

    def share_added(
        self,
        site: str,
        total: NDArray[np.float64],
        share: NDArray[np.int64],
        integers: NDArray[np.int64],
    ) -> None:
        self.sums[site].append(total.copy())
        self.noise[site].append(share.copy())
        self.integers[site].append(integers.copy())

    def summed(self, site: str, round_: int, attempt: int, total: NDArray[Any]) -> None:
        self.totals[site].append(total.copy())

    def replica(self, site: str, round_: int, replica: NDArray[np.float32]) -> None:
        self.replicas[site].append(replica.copy())

    def contributions(self, rank: int) -> list[tuple[int, int]]:
        """(round, attempt) of all that a site gave to a sum."""
        heads = [decode(r.head, r.bulk) for r in self.wire if r.sent and r.rank == rank]
        return [(m.round, m.attempt) for m in heads if m.kind is Kind.CONTRIBUTION]
