"""How a site's contribution leaves it, block by block as it is encrypted: to rank 0 as messages,
or into a sum that MPI makes.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from privfl.federation.messages import Message
from privfl.secagg import Layout
from privfl.secagg.parameters import CIPHERTEXT_WORDS, SumPath
from privfl.transport import Reduction, Transport, finish

# So many sums may be under way while the next block is encrypted.
_UNDER_WAY = 4


class Upload:
    """Sends one contribution of a site.

    ``ranks``: the members of the sum, this site included; ``head``: what each message says.
    """

    def __init__(
        self, transport: Transport, ranks: Sequence[int], path: SumPath, head: Message
    ) -> None:
        self._transport, self._ranks, self._path, self._head = transport, ranks, path, head
        self._handed = 0

    def send(self, blocks: Iterable[NDArray[np.uint64]]) -> None:
        """Send all blocks; with ``reduce`` only an empty message says that they are handed over.

        Raises:
            PrivflError: If other members do not take part in the reduction in time.
        """
        if self._path == "star":
            for part, block in enumerate(blocks):
                self._transport.send(
                    0, *replace(self._head, part=part, bulk=block.data.cast("B")).encode()
                )
            return
        self._reduce(blocks)
        self._transport.send(0, *replace(self._head, part=0, parts=1).encode())

    def give_up(self, layout: Layout) -> None:
        """Take part in what is left of a reduction with zeros: it is nobody's sum any more, but
        without them no rank could leave it.
        """
        if self._path == "reduce":
            sizes = [
                layout.ciphertexts(number) * CIPHERTEXT_WORDS
                for number in range(self._handed, layout.blocks)
            ]
            self._reduce(np.zeros(size, dtype=np.uint64) for size in sizes)

    def _reduce(self, blocks: Iterable[NDArray[np.uint64]]) -> None:
        waiting: collections.deque[Reduction] = collections.deque()
        for block in blocks:
            waiting.append(self._transport.reduce(self._ranks, block))
            self._handed += 1
            if len(waiting) > _UNDER_WAY:
                finish(waiting.popleft())
        while waiting:
            finish(waiting.popleft())
