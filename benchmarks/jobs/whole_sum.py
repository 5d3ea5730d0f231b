"""One rank of a whole sum, as `benchmarks.secure_aggregation` starts it under mpiexec.

Arguments: way, parameters, repeats.

Rank 0 prints the median seconds of a sum and its own peak memory. All ways use the same transport.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from benchmarks.secure_aggregation import (
    NVFLARE,
    SLOTS,
    SPAN,
    nvflare_context,
    nvflare_encrypt,
    vector_of,
)


def job(way: str, parameters: int, repeats: int) -> None:
    """One rank of a whole sum; rank 0 prints the median seconds and its peak memory."""
    from privfl.transport import mpi

    transport = mpi.start()
    sites = transport.size - 1
    part = {"privfl": _privfl, "privfl-reduce": _privfl, NVFLARE: _nvflare, "plain": _plain}[way](
        transport, sites, parameters, way
    )
    seconds = []
    for number in range(repeats + 1):
        _meet(transport)
        started = time.perf_counter()
        part(number + 1)
        _meet(transport)
        seconds.append(time.perf_counter() - started)
    if transport.rank == 0:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        sys.stdout.write(json.dumps({"seconds": median(seconds[1:]), "peak": peak}) + "\n")
    transport.flush(60)
    transport.close()


def _meet(transport: Any) -> None:
    transport.flush(600)
    others = range(1, transport.size) if transport.rank == 0 else [0]
    if transport.rank:
        transport.send(0, b"here")
        transport.receive(600)
    else:
        for _ in others:
            transport.receive(600)
        for rank in others:
            transport.send(rank, b"go")


def _share(transport: Any, mine: bytes) -> list[bytes]:
    """What each rank gives, at every rank; for setting up only."""
    if transport.rank:
        transport.send(0, b"mine", mine)
        return [bytes(transport.receive(600).bulk) for _ in range(transport.size)]
    got = {0: mine} | {
        frame.peer: bytes(frame.bulk)
        for frame in (transport.receive(600) for _ in range(1, transport.size))
    }
    for rank in range(1, transport.size):
        for other in sorted(got):
            transport.send(rank, b"all", got[other])
    return [got[rank] for rank in sorted(got)]


def _privfl(transport: Any, sites: int, parameters: int, way: str) -> Callable[[int], None]:
    from privfl.coordinator.driver import ReducingAdder
    from privfl.federation.messages import Kind, Message
    from privfl.identity import Identity
    from privfl.secagg import ExchangeKey, FixedPoint, Layout, WordAdder, derive, usual_value_bits
    from privfl.secagg.session.keys import RunKeys
    from privfl.secagg.session.roster import Member, Roster
    from privfl.secagg.session.sums import SumSession
    from privfl.site.upload import Upload

    p = derive(sites, usual_value_bits(sites))
    layout, path = Layout(parameters, p), "reduce" if way == "privfl-reduce" else "star"
    ranks = tuple(range(1, sites + 1))
    if transport.rank == 0:
        _share(transport, b"")
        _share(transport, b"")
        adder = WordAdder(p) if path == "star" else ReducingAdder(transport, ranks, p)

        def add(number: int) -> None:
            adder.open(layout)
            parts = dict.fromkeys(ranks, 0)
            for _ in range(sites * (layout.blocks if path == "star" else 1)):
                frame = transport.receive(600)
                if path == "star":
                    adder.add(parts[frame.peer], frame.bulk)
                    parts[frame.peer] += 1
            for part in range(layout.blocks):
                block = adder.block(part)
                for rank in ranks:
                    transport.send(rank, b"total", block)
            adder.close()

        return add

    exchange = ExchangeKey()
    members = [
        Member(f"s{r}", public, Identity().public)
        for r, public in enumerate(_share(transport, exchange.public))
        if r
    ]
    own = RunKeys.make(p).secret_bytes() if transport.rank == 1 else b""
    keys = RunKeys.from_secret_bytes(_share(transport, own)[1], p)
    sums = SumSession(Roster(tuple(members), bytes(32)), exchange, keys)
    vector, grid = vector_of(transport.rank, parameters), FixedPoint(p, SPAN)

    def contribute(number: int) -> None:
        one = sums.open(number, 1, parameters, grid, [])
        Upload(transport, ranks, path, Message(Kind.CONTRIBUTION, parts=layout.blocks)).send(
            one.contribution(vector)
        )
        for _ in range(layout.blocks):
            one.collect(transport.receive(600).bulk)
        total = one.total()
        assert number > 1 or abs(total[0] - sum(vector_of(r, 1)[0] for r in ranks)) < 1e-4

    return contribute


def _nvflare(transport: Any, sites: int, parameters: int, way: str) -> Callable[[int], None]:
    import tenseal

    count = -(-parameters // SLOTS)
    if transport.rank == 0:
        public = tenseal.context_from(_share(transport, b"")[1])

        def add(number: int) -> None:
            total: list[Any] = [None] * count
            parts = dict.fromkeys(range(1, sites + 1), 0)
            for _ in range(sites * count):
                frame = transport.receive(600)
                ciphertext = tenseal.ckks_vector_from(public, bytes(frame.bulk))
                index = parts[frame.peer]
                parts[frame.peer] += 1
                if total[index] is None:
                    total[index] = ciphertext
                else:
                    total[index].add_(ciphertext)
            for running in total:
                data = running.serialize()
                for rank in range(1, sites + 1):
                    transport.send(rank, b"total", data)

        return add

    context = nvflare_context()[0] if transport.rank == 1 else None
    own = (
        context.serialize(
            save_public_key=False,
            save_secret_key=True,
            save_galois_keys=False,
            save_relin_keys=True,
        )
        if context
        else b""
    )
    context = tenseal.context_from(_share(transport, own)[1])
    vector = vector_of(transport.rank, parameters)

    def contribute(number: int) -> None:
        for ciphertext in nvflare_encrypt(context, vector):
            transport.send(0, b"c", ciphertext)
        np.concatenate(
            [
                tenseal.ckks_vector_from(context, bytes(transport.receive(600).bulk)).decrypt()
                for _ in range(count)
            ]
        )

    return contribute


def _plain(transport: Any, sites: int, parameters: int, way: str) -> Callable[[int], None]:
    block = 1 << 19
    blocks = [slice(start, min(start + block, parameters)) for start in range(0, parameters, block)]
    if transport.rank == 0:

        def add(number: int) -> None:
            total = np.zeros(parameters, dtype=np.float32)
            parts = dict.fromkeys(range(1, sites + 1), 0)
            for _ in range(sites * len(blocks)):
                frame = transport.receive(600)
                total[blocks[parts[frame.peer]]] += np.frombuffer(frame.bulk, dtype=np.float32)
                parts[frame.peer] += 1
            for where in blocks:
                for rank in range(1, sites + 1):
                    transport.send(rank, b"total", total[where].data.cast("B"))

        return add

    vector = vector_of(transport.rank, parameters)

    def contribute(number: int) -> None:
        for where in blocks:
            transport.send(0, b"c", vector[where].astype(np.float32).data.cast("B"))
        np.concatenate(
            [np.frombuffer(transport.receive(600).bulk, dtype=np.float32) for _ in blocks]
        )

    return contribute


if __name__ == "__main__":
    job(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
