"""Stage 5: sums of ciphertexts, by a side that holds no key.

A ciphertext is 2 * N words of 64 bits, each below a prime q, so the sum of ciphertexts is the sum
of their words modulo q. The adding side needs no key and no ciphertext object.
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
    """Adds the members' contributions to one sum, block by block."""

    def open(self, layout: Layout) -> None:
        """Start a new sum of contributions of this layout; the previous sum is forgotten."""
        ...

    def add(self, index: int, block: bytes | memoryview) -> None:
        """Add one member's block ``index``: little-endian words of 64 bits, each below q.

        Raises:
            ProtocolError: If the layout has no block ``index``, or ``block`` is not of its length.
        """
        ...

    def block(self, index: int) -> memoryview:
        """The sum of all blocks ``index`` that were added, as bytes; each word is below q.

        The memory is the adder's own: nothing may be added to this block while it is being sent.

        Raises:
            InternalError: If no block ``index`` was added.
        """
        ...

    def close(self) -> None:
        """Forget the sum."""
        ...


def _words(index: int, block: bytes | memoryview, layout: Layout) -> NDArray[np.uint64]:
    size = memoryview(block).nbytes
    if not 0 <= index < layout.blocks or size != 8 * CIPHERTEXT_WORDS * layout.ciphertexts(index):
        raise ProtocolError(
            f"a contribution's block {index} has {size} bytes, which is not its length"
        )
    return np.frombuffer(block, dtype="<u8")


class WordAdder:
    """Adds words in place as they arrive; memory bandwidth is the limit."""

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
    """Reduce sums of ``additions`` words, each below ``prime``, modulo ``prime``, in place."""
    for start in range(0, len(words), _PIECE):
        piece = words[start : start + _PIECE]
        for power in range((additions - 1).bit_length() - 1, -1, -1):
            # Where there is nothing to subtract, the unsigned difference wraps around to a large
            # number, and the minimum is the word itself.
            np.minimum(piece, piece - np.uint64(prime << power), out=piece)


class EvaluatorAdder:
    """Adds with TenSEAL's own evaluator: same sums as :class:`WordAdder`, slower.

    For a TenSEAL with which :func:`privfl.secagg.self_test.prove` could not show that sums of words
    are sums of ciphertexts.
    """

    def __init__(self, parameters: Parameters) -> None:
        # A key of its own that encrypts nothing and decrypts nothing: it only shows what precedes
        # the words in a saved ciphertext of these parameters.
        sample = SumKey(parameters)
        self._ring, self._prefix = sample.ring, sample.prefix
        self._sums: list[list[object] | None] = []

    def open(self, layout: Layout) -> None:
        self._layout = layout
        self._sums = [None] * layout.blocks

    def add(self, index: int, block: bytes | memoryview) -> None:
        words, total = _words(index, block, self._layout), self._sums[index]
        ciphertexts = [
            self._ring.ciphertext(self._prefix, row) for row in words.reshape(-1, CIPHERTEXT_WORDS)
        ]
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
