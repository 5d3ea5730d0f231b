"""The randomness of noise and samples: from the operating system, anew in every process.

torch's generators are not used for anything that protects: an unseeded ``torch.Generator()`` has
the same constant seed in every process, and a user's ``torch.manual_seed`` would make the noise of
all sites equal.
"""

from __future__ import annotations

import hashlib
import os
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

_ZEROS = bytes(1 << 20)
# How many bytes one key of the stream cipher gives. Few enough that blocks which never repeat
# cannot be told from random ones (advantage 2^-93 for a key, Bellare, Kilian, Rogaway 1994), and
# that somebody who comes to see a key can repeat little; enough that new keys cost nothing.
_KEY_BYTES = 4 << 20
_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


class Randomness(Protocol):
    """A source of random bytes.

    Attributes:
        private: whether nobody can repeat its bytes.
    """

    private: bool

    def bytes(self, count: int) -> bytes:
        """``count`` random bytes, all of them new."""
        ...


class SystemRandomness:
    """The operating system's cryptographic generator, through a stream cipher: AES-256 in
    counter mode under keys from it.

    A key serves for 4 MiB and is then forgotten.

    Guarantee: No part of a stream is given out twice, and a process that was forked off takes a new
        key. It is recognised by the process number, which also changes in forks that Python does
        not see, and by a count of forks, for a process number that was used before.
    """

    private = True

    def __init__(self) -> None:
        self._left, self._process = 0, (0, 0)

    def bytes(self, count: int) -> bytes:
        pieces = []
        process = os.getpid(), _forks
        while count > 0:
            if self._left <= 0 or self._process != process:
                # The counter begins at zero because every key serves a single stream.
                self._cipher = Cipher(
                    algorithms.AES256(os.urandom(32)), modes.CTR(bytes(16))
                ).encryptor()
                self._left, self._process = _KEY_BYTES, process
            length = min(count, self._left, len(_ZEROS))
            pieces.append(self._cipher.update(memoryview(_ZEROS)[:length]))
            self._left -= length
            count -= length
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class SeededRandomness:
    """A repeatable source for tests; each ``site`` has a stream of its own.

    Whoever knows the seed can subtract the noise, so nothing that is made with it is private.
    """

    private = False

    def __init__(self, seed: int, site: str) -> None:
        key = hashlib.sha256(f"privfl insecure test seed {seed} {site}".encode()).digest()
        self._generator = np.random.Generator(
            np.random.Philox(key=np.frombuffer(key[:16], dtype=np.uint64))
        )

    def bytes(self, count: int) -> bytes:
        return self._generator.bytes(count)


def randomness(seed: int | None, stream: str) -> Randomness:
    """The operating system's randomness; with a ``seed``, as tests give one, a repeatable source
    of its own for each ``stream``.
    """
    return SystemRandomness() if seed is None else SeededRandomness(seed, stream)


def poisson_sample(records: int, sampling_rate: float, randomness: Randomness) -> NDArray[np.int64]:
    """The indices of a Poisson sample of ``records`` records.

    Guarantee: Each record is in the sample independently of all others, with a probability of at
        most ``sampling_rate``: the decision compares a 64-bit integer with floor(q * 2^64).

    Returns:
        Shape (batch,), rising; the batch may be empty. Its size is private and must not leave the
        site.
    """
    if sampling_rate >= 1.0:
        return np.arange(records, dtype=np.int64)
    draws = np.frombuffer(randomness.bytes(8 * records), dtype=np.uint64)
    return np.flatnonzero(draws < np.uint64(int(sampling_rate * 2**64)))


def gaussian(count: int, standard_deviation: float, randomness: Randomness) -> NDArray[np.float64]:
    """``count`` independent normal variates with mean 0; shape (count,).

    By inversion: 53 uniform bits, centred in their cells, go through the inverse of the normal
    distribution function. So the tails end at 8.2 standard deviations, at a total variation
    distance of 2^-53 per variate. Floating-point noise is not hardened against attacks on its
    low-order bits (Mironov 2012); docs/sharp-edges.md says so.
    """
    from scipy.special import ndtri

    bits = np.frombuffer(randomness.bytes(8 * count), dtype=np.uint64) >> np.uint64(11)
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-53
    return np.asarray(ndtri(uniform), dtype=np.float64) * standard_deviation
