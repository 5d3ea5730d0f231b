"""Encrypted sums that the ranks of a group make among themselves, where every rank is a site."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfl._rank_group import RankGroup
from privfl.errors import MismatchError, PrivflError, ProtocolError
from privfl.federation import messages
from privfl.federation.messages import Kind, Message
from privfl.secagg import Layout, Parameters, WordAdder
from privfl.secagg.adders import reduce_words
from privfl.secagg.parameters import SumPath
from privfl.secagg.quantise import Quantiser
from privfl.secagg.session.sums import SumSession
from privfl.site.upload import Upload
from privfl.transport import finish


class GroupSum:
    """Encrypted, masked sums over a group.

    Guarantee: Whatever some ranks pool, rank 0 included, they learn of the other ranks' vectors
        only their sum. Keys are not pinned and rank 0 holds the key, so it must run this code
        unchanged.

    Args:
        group: the ranks.
        session: what opens the sums, from :meth:`RankGroup.join`.
        path: whether rank 0 adds contributions, or the MPI library does.
    """

    def __init__(self, group: RankGroup, session: SumSession, path: SumPath) -> None:
        self._group, self._session, self._path = group, session, path

    @property
    def parameters(self) -> Parameters:
        """The parameters of the encrypted sums."""
        return self._session.parameters

    def sum(
        self, accept: Callable[[], NDArray[Any]], quantiser: Quantiser, state: str = ""
    ) -> NDArray[Any]:
        """The sum of all ranks' vectors, at every rank. Collective.

        Args:
            accept: returns this rank's vector, of the same shape at all ranks, or raises what is
                wrong with it.
            quantiser: how its numbers become integers, and sums of integers numbers again.
            state: a text that must be the same at all ranks.

        Returns:
            The sum, of the shape of the vector.

        Raises:
            PrivflError: At all ranks, if one rank's vector does not fit; nothing of any vector has
                left its rank then.
            MismatchError: If the decrypted sum is not the sum of what the ranks sent; the keys are
                given up, and later sums fail at all ranks.
        """
        group = self._group

        def accepted() -> NDArray[Any]:
            if self._session.given_up:
                raise MismatchError
            vector = accept()
            quantiser.check(vector)
            return vector

        vector = group.agree_on(accepted, state)
        flat = vector.reshape(-1)
        attempt = self._session.open(group.round, 1, len(flat), quantiser, [])
        layout = Layout(len(flat), self.parameters)
        blocks = attempt.contribution(flat)
        if group.rank:
            head = Message(Kind.CONTRIBUTION, group.run, group.round, 1, parts=layout.blocks)
            Upload(group.transport, [*group.others], self._path, head).send(blocks)
            totals: Iterator[bytes | memoryview] = self._receive(layout)
        else:
            totals = self._add(layout, blocks)
        for block in totals:
            attempt.collect(block)
        if not group.transport.flush(group.timeout):
            raise PrivflError(
                f"a sum could not be sent within {group.timeout:.0f} s; another rank is gone or "
                "stuck"
            )
        return attempt.total().reshape(vector.shape)

    def _add(self, layout: Layout, blocks: Iterator[NDArray[np.uint64]]) -> Iterator[memoryview]:
        """On rank 0: the sums of all blocks, each sent to all ranks once it is complete."""
        group = self._group
        totals = self._reduced(blocks) if self._path == "reduce" else self._added(layout, blocks)
        for part, total in enumerate(totals):
            message = Message(
                Kind.TOTAL, group.run, group.round, 1, part, layout.blocks, bulk=total
            )
            for rank in group.others:
                group.transport.send(rank, *message.encode())
            yield total

    def _reduced(self, blocks: Iterator[NDArray[np.uint64]]) -> Iterator[memoryview]:
        group = self._group
        under_way = [(words, group.transport.reduce([*group.others], words)) for words in blocks]
        for words, part in under_way:
            finish(part)
            reduce_words(words, self.parameters.prime, group.size)
        # Every rank says that all of its part is in the sum before any rank gets a total and goes
        # on to the next sum.
        group.from_all(Kind.CONTRIBUTION)
        for words, _ in under_way:
            yield words.data.cast("B")

    def _added(self, layout: Layout, blocks: Iterator[NDArray[np.uint64]]) -> Iterator[memoryview]:
        adder = WordAdder(self.parameters)
        adder.open(layout)
        parts = dict.fromkeys(self._group.others, 0)
        for own, words in enumerate(blocks):
            adder.add(own, words.data.cast("B"))
            while self._take(adder, parts, layout, 0.0):
                pass
        timeout = self._group.timeout
        while any(part < layout.blocks for part in parts.values()):
            if not self._take(adder, parts, layout, timeout):
                raise PrivflError(
                    f"no contribution arrived within {timeout:.0f} s; another rank is gone or stuck"
                )
        for part in range(layout.blocks):
            yield adder.block(part)

    def _take(
        self, adder: WordAdder, parts: dict[int, int], layout: Layout, timeout: float
    ) -> bool:
        group = self._group
        frame = group.transport.receive(timeout)
        if frame is None:
            return False
        message = messages.decode(frame.head, frame.bulk)
        head = (message.kind, message.run, message.round, message.part, message.parts)
        if head != (Kind.CONTRIBUTION, group.run, group.round, parts[frame.peer], layout.blocks):
            raise ProtocolError(
                f"rank {frame.peer} sent a {message.kind.name} message where the next block of its "
                "contribution was due"
            )
        adder.add(message.part, message.bulk)
        parts[frame.peer] += 1
        return True

    def _receive(self, layout: Layout) -> Iterator[bytes | memoryview]:
        for part in range(layout.blocks):
            message = self._group.expect(Kind.TOTAL)
            if (message.part, message.parts) != (part, layout.blocks):
                raise ProtocolError(
                    f"rank 0 sent block {message.part} of {message.parts} of a sum, expected "
                    f"{part} of {layout.blocks}"
                )
            yield message.bulk
