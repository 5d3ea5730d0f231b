"""Stages 4 and 6: CKKS through TenSEAL's SEAL layer, with integers in the coefficients, exact
with certainty.

An encryption of zero is taken out of NTT form and Delta times the integer is added to each
coefficient of c0. The error that SEAL adds is at most 21 per coefficient and ciphertext, so after
decryption rounding to multiples of Delta gives the integer sum; no floating point and no Fourier
transform takes part. N = 4096 with one prime of 54 to 60 bits (128-bit security allows 109),
symmetric.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfl.errors import InternalError, ProtocolError
from privfl.secagg.parameters import CIPHERTEXT_WORDS, DEGREE, Parameters
from privfl.secagg.seal import body_of, load_body

_WORD_BYTES = 8 * CIPHERTEXT_WORDS
_HALF_BYTES = 8 * DEGREE
# SEAL's serialised description of a generator: header, kind, 64 bytes of seed.
SEED_BYTES = 81
SEEDED_BYTES = _HALF_BYTES + SEED_BYTES


@functools.cache
def _sealapi() -> Any:
    from tenseal import sealapi

    return sealapi


class Ring:
    """SEAL's context for one prime, and what ciphertexts of it look like. It holds no key."""

    def __init__(self, prime: int) -> None:
        seal = _sealapi()
        parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
        parameters.set_poly_modulus_degree(DEGREE)
        parameters.set_coeff_modulus(seal.CoeffModulus.Create(DEGREE, [prime.bit_length()]))
        if parameters.coeff_modulus()[0].value() != prime:
            raise InternalError(
                "TenSEAL chooses another prime than the parameters were derived for"
            )
        self.context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)
        if not self.context.parameters_set():
            raise InternalError("TenSEAL refuses the encryption parameters")
        self.prime = prime
        self.evaluator = seal.Evaluator(self.context)

    def ciphertext(self, front: bytes, words: NDArray[np.uint64]) -> Any:
        """A ciphertext with these words; ``front``: what comes before the words in the body of
        one of the same form.
        """
        return load_body(_sealapi().Ciphertext(), self.context, front + words.tobytes())

    def words(self, ciphertext: Any) -> NDArray[np.uint64]:
        """The words of a ciphertext: c0, then c1; shape (CIPHERTEXT_WORDS,)."""
        words = np.empty(CIPHERTEXT_WORDS, dtype="<u8")
        self.copy_words(ciphertext, words)
        return words

    def copy_words(self, ciphertext: Any, out: NDArray[np.uint64]) -> None:
        """Put the words of a ciphertext into ``out``."""
        # As bytes, because in the body they do not stand at a multiple of 8.
        out.view(np.uint8)[:] = np.frombuffer(body_of(ciphertext), dtype=np.uint8)[-_WORD_BYTES:]

    def expand(self, seeded: bytes, front: bytes) -> NDArray[np.uint64]:
        """The words behind a seeded ciphertext; ``front`` as :attr:`SumKey.seeded_front`; shape
        (CIPHERTEXT_WORDS,).

        Raises:
            ProtocolError: it is none.
        """
        if len(seeded) != SEEDED_BYTES:
            raise ProtocolError(
                f"a seeded ciphertext has {len(seeded)} bytes, expected {SEEDED_BYTES}"
            )
        # SEAL makes c1 in NTT form; the zeros in the place of c0 are the same in both forms.
        body = front + bytes(_HALF_BYTES) + seeded[_HALF_BYTES:]
        carrier = load_body(_sealapi().Ciphertext(), self.context, body)
        self.evaluator.transform_from_ntt_inplace(carrier)
        words = self.words(carrier)
        words[:DEGREE] = np.frombuffer(seeded[:_HALF_BYTES], dtype="<u8")
        return words

    def front(self, ciphertext: Any) -> bytes:
        """What stands before the words; the same for all ciphertexts of one form."""
        return body_of(ciphertext)[:-_WORD_BYTES]


class SumKey:
    """The secret key shared by the members of one run: encrypts integers, decrypts their sum.

    In memory only.
    """

    def __init__(self, parameters: Parameters, secret: bytes | None = None) -> None:
        seal, self.parameters = _sealapi(), parameters
        self.ring = Ring(parameters.prime)
        context = self.ring.context
        key = (
            seal.KeyGenerator(context).secret_key()
            if secret is None
            else load_body(seal.SecretKey(), context, secret)
        )
        self._key = key
        self._encryptor = seal.Encryptor(context, key)
        self._decryptor = seal.Decryptor(context, key)
        zero = self._zero = seal.Ciphertext()
        self._encryptor.encrypt_zero_symmetric(zero)
        # c0 is 0 and c1 is 1; SEAL refuses a ciphertext whose c1 is zero too.
        empty = np.repeat(np.array([0, 1], dtype="<u8"), DEGREE)
        self._carrier = self.ring.ciphertext(self.ring.front(zero), empty)
        self.ring.evaluator.transform_from_ntt_inplace(zero)
        self.front = self.ring.front(zero)
        self._room = np.empty(DEGREE, dtype=np.uint64)
        # Words of encryptions of zero that were made ahead. Each is taken out before it is used,
        # and so used once.
        self._ahead: list[NDArray[np.uint64]] = []

    @functools.cached_property
    def seeded_front(self) -> bytes:
        """What stands before c0 and seed in the body of a seeded ciphertext."""
        return body_of(self._encryptor.encrypt_zero_symmetric())[:-SEEDED_BYTES]

    def secret_bytes(self) -> bytes:
        """The key as bytes, to be sealed to another site and to go nowhere else."""
        return body_of(self._key)

    def encrypt(self, integers: NDArray[np.uint64], out: NDArray[np.uint64]) -> None:
        """Encrypt integers modulo 2^P, whatever stands above their lowest P bits.

        Args:
            integers: shape (DEGREE,).
            out: where the words go: c0, then c1; shape (CIPHERTEXT_WORDS,).
        """
        if self._ahead:
            out[:] = self._ahead.pop()
        else:
            self._encrypt_zero(out)
        self._embed(integers, out[:DEGREE])

    def encrypt_ahead(self, most: int) -> bool:
        """Do what takes longest of an :meth:`encrypt` to come, unless it is done for ``most`` of
        them; whether there was anything to do.
        """
        if len(self._ahead) >= most:
            return False
        words = np.empty(CIPHERTEXT_WORDS, dtype="<u8")
        self._encrypt_zero(words)
        self._ahead.append(words)
        return True

    def _encrypt_zero(self, out: NDArray[np.uint64]) -> None:
        self._encryptor.encrypt_zero_symmetric(self._zero)
        self.ring.evaluator.transform_from_ntt_inplace(self._zero)
        self.ring.copy_words(self._zero, out)

    def encrypt_seeded(self, integers: NDArray[np.uint64]) -> bytes:
        """Encrypt as :meth:`encrypt`, in half the size: c0, and instead of c1 the seed that
        makes it (:meth:`Ring.expand`).
        """
        body = body_of(self._encryptor.encrypt_zero_symmetric())
        whole = load_body(_sealapi().Ciphertext(), self.ring.context, body)
        self.ring.evaluator.transform_from_ntt_inplace(whole)
        c0 = self.ring.words(whole)[:DEGREE]
        self._embed(integers, c0)
        return c0.tobytes() + body[-SEED_BYTES:]

    def _embed(self, integers: NDArray[np.uint64], c0: NDArray[np.uint64]) -> None:
        """c0 + Delta * r modulo q in place, r being the centred integers."""
        p, room = self.parameters, self._room
        prime, half, k = (
            np.uint64(p.prime),
            np.uint64(1 << (p.word_bits - 1)),
            np.uint64(p.delta_bits),
        )
        # Delta * (r + 2^(P-1)) is not negative; what it is too much is taken from q, which is added
        # so that nothing falls below zero.
        np.add(integers, half, out=room)
        np.bitwise_and(room, (half << np.uint64(1)) - np.uint64(1), out=room)
        np.left_shift(room, k, out=room)
        room += prime - (half << k)
        c0 += room
        # |Delta * r| < q / 4, so the sum is below 9 q / 4 < 2^62; the unsigned minimum takes q away
        # twice where it can be taken.
        for _ in range(2):
            np.subtract(c0, prime, out=room)
            np.minimum(c0, room, out=c0)

    def decrypt(self, words: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The sums of the integers behind summed words, modulo 2^P.

        Args:
            words: those of one ciphertext after the other; shape (ciphertexts * CIPHERTEXT_WORDS,).

        Returns:
            shape (ciphertexts * DEGREE,).

        Raises:
            ProtocolError: the words are no ciphertexts.
        """
        return self.round(self.coefficients(words))

    def coefficients(self, words: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The decrypted coefficients, centred modulo q: Delta times the sum plus the error;
        shapes as with :meth:`decrypt`.

        Raises:
            ProtocolError: the words are no ciphertexts.
        """
        ring = self.ring
        if (
            words.ndim != 1
            or not len(words)
            or len(words) % CIPHERTEXT_WORDS
            or (words >= np.uint64(ring.prime)).any()
        ):
            raise ProtocolError(
                "the words of a ciphertext are not below its modulus, or not of its length"
            )
        found = np.empty(len(words) // CIPHERTEXT_WORDS * DEGREE, dtype=np.int64)
        for start in range(0, len(found), CIPHERTEXT_WORDS):
            some = found[start : start + CIPHERTEXT_WORDS]
            some[:] = self._opened(words[2 * start : 2 * (start + len(some))]).view(np.int64)[
                : len(some)
            ]
        found -= (found > ring.prime // 2) * np.int64(ring.prime)
        return found

    def _opened(self, words: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The coefficients of one ciphertext or of two; shape (CIPHERTEXT_WORDS,).

        A plaintext has no way out of NTT form of its own. As the c0 of a ciphertext it has, and a
        second one goes the same way as its c1.
        """
        evaluator, opened = self.ring.evaluator, _sealapi().Ciphertext()
        try:
            first = self._plain(words[:CIPHERTEXT_WORDS])
            if len(words) == CIPHERTEXT_WORDS:
                evaluator.add_plain(self._carrier, first, opened)
            else:
                evaluator.multiply_plain(
                    self._carrier, self._plain(words[CIPHERTEXT_WORDS:]), opened
                )
                evaluator.add_plain_inplace(opened, first)
        except (
            Exception
        ) as error:  # SEAL refuses a ciphertext or a result whose c1 is zero, and perhaps more
            raise ProtocolError("SEAL refuses to decrypt a ciphertext: it was altered") from error
        evaluator.transform_from_ntt_inplace(opened)
        return self.ring.words(opened)

    def _plain(self, words: NDArray[np.uint64]) -> Any:
        sealed, plain = self.ring.ciphertext(self.front, words), _sealapi().Plaintext()
        self.ring.evaluator.transform_to_ntt_inplace(sealed)
        self._decryptor.decrypt(sealed, plain)
        return plain

    def round(self, coefficients: NDArray[np.int64]) -> NDArray[np.uint64]:
        """The multiples of Delta next to the coefficients, divided by Delta; shape as given."""
        k = self.parameters.delta_bits
        rounded = (coefficients + np.int64(1 << (k - 1))) >> np.int64(k)
        return rounded.view(np.uint64)
