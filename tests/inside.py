"""A run of fedsgd, looked at from inside: sums, noise, integers, totals and replicas of every site."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from privfl.federation.messages import Kind, decode
from privfl.noise.discrete_gaussian import DiscreteGaussian
from privfl.noise.distributed import Shares
from privfl.site import agent
from privfl.site.algorithms import Steps
from privfl.transport import Recorded, Recording


@dataclass
class Seen:
    """What every site did, round by round."""

    sums: dict[str, list[NDArray[np.float64]]] = field(default_factory=lambda: defaultdict(list))
    noise: dict[str, list[NDArray[np.int64]]] = field(default_factory=lambda: defaultdict(list))
    integers: dict[str, list[NDArray[np.int64]]] = field(default_factory=lambda: defaultdict(list))
    totals: dict[str, list[NDArray[np.int64]]] = field(default_factory=lambda: defaultdict(list))
    replicas: dict[str, list[NDArray[np.float32]]] = field(default_factory=lambda: defaultdict(list))
    updates: dict[str, Steps] = field(default_factory=dict)
    wire: list[Recorded] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def wrap(self, transport: Any) -> Recording:
        return Recording(transport, self._keep)

    def _keep(self, recorded: Recorded) -> None:
        with self.lock:
            self.wire.append(recorded)

    def contributions(self, rank: int) -> list[tuple[int, int]]:
        """(round, attempt) of all that a site gave to a sum."""
        heads = [decode(r.head, r.bulk) for r in self.wire if r.sent and r.rank == rank]
        return [(m.round, m.attempt) for m in heads if m.kind is Kind.CONTRIBUTION]


def watch(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Keep copies of what goes through the places where sums, noise, totals and replicas are made."""
    seen, owners, drawing = Seen(), {}, threading.local()
    begin, ask, apply, add, draw, move = (
        Steps.__init__,
        Steps.ask,
        Steps.apply,
        Shares.add,
        DiscreteGaussian.draw,
        agent._Agent._move_to,
    )

    def begun(self: Steps, setup: Any, *rest: Any) -> None:
        begin(self, setup, *rest)
        owners[id(self)] = owners[id(self._shares)] = setup.site
        seen.updates[setup.site] = self

    def asked(self: Steps, trainer: Any, replica: NDArray[np.float32]) -> None:
        if not seen.replicas[owners[id(self)]]:
            seen.replicas[owners[id(self)]].append(replica.copy())
        ask(self, trainer, replica)

    def drawn(self: DiscreteGaussian, count: int) -> NDArray[np.int64]:
        # All ranks are threads, so what a thread drew last is what its site will use.
        found = draw(self, count)
        drawing.last = found.copy()
        return found

    def added(self: Shares, total: NDArray[np.float64]) -> NDArray[np.int64]:
        site, before = owners[id(self)], total.copy()
        found = add(self, total)
        seen.sums[site].append(before)
        seen.noise[site].append(drawing.last)
        seen.integers[site].append(found.copy())
        return found

    def applied(self: Steps, trainer: Any, replica: Any, total: NDArray[np.int64]) -> Any:
        seen.totals[owners[id(self)]].append(total.copy())
        return apply(self, trainer, replica, total)

    def moved(self: Any, replica: NDArray[np.float32]) -> None:
        seen.replicas[self._setup.site].append(replica.copy())
        move(self, replica)

    monkeypatch.setattr(Steps, "__init__", begun)
    monkeypatch.setattr(Steps, "ask", asked)
    monkeypatch.setattr(Steps, "apply", applied)
    monkeypatch.setattr(Shares, "add", added)
    monkeypatch.setattr(DiscreteGaussian, "draw", drawn)
    monkeypatch.setattr(agent._Agent, "_move_to", moved)
    return seen
