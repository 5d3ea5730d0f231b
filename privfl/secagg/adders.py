"""Stage 5: whoever only adds holds words of 64 bits, no key, and no ciphertext object.

A ciphertext is 2 * N words below a prime q, so the sum of ciphertexts is the sum of their words
modulo q.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from privfl.errors import InternalError, ProtocolError
from privfl.secagg.ckks import SumKey
from privfl.secagg.layout import Layout
from privfl.secagg.parameters import CIPHERTEXT_WORDS, Parameters

# Work on pieces that stay in the processor's cache.
_PIECE = 1 << 15


class Adder(Protocol):
    """Adds blocks of contributions."""

    def open(self, layout: Layout) -> None:
        """Start a new sum of contributions of this layout; the one before is forgotten."""
        ...

    def add(self, index: int, block: bytes | memoryview) -> None:
        """Add one contributor's block ``index``.

        Raises:
            ProtocolError: it has not the length of this block.
        """
        ...

    def block(self, index: int) -> memoryview:
        """The sum of all contributions' blocks ``index``, each word below q.

        It must not change while it is being sent.
        """
        ...

    def close(self) -> None:
        """Forget the sum."""
        ...


def _words(index: int, block: bytes | memoryview, layout: Layout) -> NDArray[np.uint64]:
    if not 0 <= index < layout.blocks or memoryview(
        block
    ).nbytes != 8 * CIPHERTEXT_WORDS * layout.ciphertexts(index):
        raise ProtocolError(
            f"a contribution's block {index} has {memoryview(block).nbytes} bytes, which is not "
            f"its length"
        )
    return np.frombuffer(block, dtype="<u8")


class WordAdder:
    """Adds raw words in place as they arrive, at the speed of memory."""

    def __init__(self, parameters: Parameters) -> None:
        self._prime, self._additions = parameters.prime, parameters.additions
        self._sums: list[NDArray[np.uint64] | None] = []
        self._added: list[int] = []

    def open(self, layout: Layout) -> None:
        self._layout = layout
        self._sums = [None] * layout.blocks
        self._added = [0] * layout.blocks

    def add(self, index: int, block: bytes | memoryview) -> None:
        words, total = _words(index, block, self._layout), self._sums[index]
        if total is None:
            self._sums[index] = words.copy()
        else:
            if self._added[index] == self._additions:
                reduce_words(total, self._prime, self._additions)
                self._added[index] = 1
            total += words
        self._added[index] += 1

    def block(self, index: int) -> memoryview:
        total = self._sums[index]
        if total is None:
            raise InternalError("a sum was asked for before anything was added")
        reduce_words(total, self._prime, self._added[index])
        self._added[index] = 1
        return total.data.cast("B")

    def close(self) -> None:
        self._sums = []


def reduce_words(words: NDArray[np.uint64], prime: int, additions: int) -> None:
    """Bring sums of ``additions`` reduced words below ``prime``, in place."""
    for start in range(0, len(words), _PIECE):
        piece = words[start : start + _PIECE]
        for power in range((additions - 1).bit_length() - 1, -1, -1):
            # The unsigned difference wraps around to something large where there is nothing to take
            # away.
            np.minimum(piece, piece - np.uint64(prime << power), out=piece)


class EvaluatorAdder:
    """Adds with TenSEAL's own evaluator: for a TenSEAL whose words were not proven to add up.

    Slower, same result.
    """

    def __init__(self, parameters: Parameters) -> None:
        # A key of its own that encrypts nothing: it only shows what ciphertexts of these parameters
        # look like.
        sample = SumKey(parameters)
        self._ring, self._front = sample.ring, sample.front
        self._sums: list[list[object] | None] = []

    def open(self, layout: Layout) -> None:
        self._layout = layout
        self._sums = [None] * layout.blocks

    def add(self, index: int, block: bytes | memoryview) -> None:
        words, total = (
            _words(index, block, self._layout).reshape(-1, CIPHERTEXT_WORDS),
            self._sums[index],
        )
        ciphertexts = [self._ring.ciphertext(self._front, row) for row in words]
        if total is None:
            self._sums[index] = ciphertexts
        else:
            for running, ciphertext in zip(total, ciphertexts, strict=True):
                self._ring.evaluator.add_inplace(running, ciphertext)

    def block(self, index: int) -> memoryview:
        total = self._sums[index]
        if total is None:
            raise InternalError("a sum was asked for before anything was added")
        return memoryview(b"".join(self._ring.words(ciphertext).tobytes() for ciphertext in total))

    def close(self) -> None:
        self._sums = []
