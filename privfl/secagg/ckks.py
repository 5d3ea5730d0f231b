"""Stages 4 and 6: CKKS through TenSEAL's SEAL layer, with integers in the coefficients.

An encryption of zero is taken out of NTT form, and Delta times the integer is added to each
coefficient of c0. The error that SEAL adds is at most 21 per coefficient and ciphertext, so that
rounding a decrypted sum to multiples of Delta gives the integer sum with certainty; no floating
point and no Fourier transform takes part. Encryption is symmetric, with N = 4096 and one prime of
54 to 60 bits (128-bit security allows 109).
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


@functools.cache
def _sealapi() -> Any:
    from tenseal import sealapi

    return sealapi


class Ring:
    """SEAL's context for one prime, and its ciphertexts as words. It holds no key.

    Args:
        prime: q, the modulus of the ciphertexts, which TenSEAL must choose too.

    Raises:
        InternalError: If TenSEAL chooses another prime for this many bits, or refuses the
            parameters.
    """

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

    def ciphertext(self, prefix: bytes, words: NDArray[np.uint64]) -> Any:
        """A SEAL ciphertext with these words.

        Args:
            prefix: :meth:`prefix` of a ciphertext of the same form.
            words: c0, then c1; shape (CIPHERTEXT_WORDS,).

        Raises:
            ProtocolError: If SEAL refuses to load the words.
        """
        return load_body(_sealapi().Ciphertext(), self.context, prefix + words.tobytes())

    def words(self, ciphertext: Any) -> NDArray[np.uint64]:
        """The words of a ciphertext: c0, then c1; shape (CIPHERTEXT_WORDS,)."""
        words = np.empty(CIPHERTEXT_WORDS, dtype="<u8")
        self.copy_words(ciphertext, words)
        return words

    def copy_words(self, ciphertext: Any, out: NDArray[np.uint64]) -> None:
        """Copy the words of a ciphertext to ``out``; shape (CIPHERTEXT_WORDS,)."""
        # As bytes, because the words do not begin at a multiple of 8 in the body.
        out.view(np.uint8)[:] = np.frombuffer(body_of(ciphertext), dtype=np.uint8)[-_WORD_BYTES:]

    def prefix(self, ciphertext: Any) -> bytes:
        """The part of a saved body before the words; the same for all ciphertexts of one form (in
        NTT form, or not).
        """
        return body_of(ciphertext)[:-_WORD_BYTES]


class SumKey:
    """The CKKS key that the members of one run share: encrypts integers, decrypts their sum.

    It exists in memory only.

    Guarantee: the sum of at most ``parameters.members`` encryptions under this key decrypts to the
    exact sum of their integers modulo 2^P, with certainty (proof 1 of docs/secure-aggregation.md).
    What :meth:`decrypt` returns carries nothing of the encryptions' errors.

    Args:
        parameters: Those of the sum.
        secret: The bytes from :meth:`secret_bytes`; a new key if None.

    Attributes:
        ring: SEAL's context.
        prefix: What precedes the words in the body of a ciphertext that is not in NTT form.

    Raises:
        ProtocolError: If ``secret`` is not a key for these parameters.
        InternalError: If TenSEAL does not fit the parameters; see :class:`Ring`.
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
        self._carrier = self.ring.ciphertext(self.ring.prefix(zero), empty)
        self.ring.evaluator.transform_from_ntt_inplace(zero)
        self.prefix = self.ring.prefix(zero)
        self._scratch = np.empty(DEGREE, dtype=np.uint64)
        # Words of encryptions of zero that were made ahead. Each is removed before it is used, and
        # so used once.
        self._ahead: list[NDArray[np.uint64]] = []

    def secret_bytes(self) -> bytes:
        """The key as bytes, which may leave this process only sealed to another site."""
        return body_of(self._key)

    def encrypt(self, integers: NDArray[np.uint64], out: NDArray[np.uint64]) -> None:
        """Encrypt integers modulo 2^P; bits above the lowest P are ignored.

        Args:
            integers: What to encrypt; shape (DEGREE,).
            out: Filled with the words: c0, then c1; shape (CIPHERTEXT_WORDS,).
        """
        if self._ahead:
            out[:] = self._ahead.pop()
        else:
            self._encrypt_zero(out)
        self._embed(integers, out[:DEGREE])

    def encrypt_ahead(self, most: int) -> bool:
        """Make one encryption of zero, the slow part of :meth:`encrypt`, for a later call.

        Returns:
            Whether one was made; not if ``most`` of them are waiting to be used.
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

    def _embed(self, integers: NDArray[np.uint64], c0: NDArray[np.uint64]) -> None:
        """Add Delta * r to c0 modulo q, in place, where r is the centred integers."""
        p, scratch = self.parameters, self._scratch
        prime, half = np.uint64(p.prime), np.uint64(1 << (p.word_bits - 1))
        shift = np.uint64(p.delta_bits)
        # Delta * (r + 2^(P-1)) is not negative. Its excess, Delta * 2^(P-1), is subtracted from q,
        # and q is added, so that nothing falls below zero.
        np.add(integers, half, out=scratch)
        np.bitwise_and(scratch, (half << np.uint64(1)) - np.uint64(1), out=scratch)
        np.left_shift(scratch, shift, out=scratch)
        scratch += prime - (half << shift)
        c0 += scratch
        # |Delta * r| < q / 4, so the sum is below 9 q / 4 < 2^62; the unsigned minimum subtracts q
        # up to twice, where the difference is not negative.
        for _ in range(2):
            np.subtract(c0, prime, out=scratch)
            np.minimum(c0, scratch, out=c0)

    def decrypt(self, words: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The sums of integers that summed ciphertexts encrypt.

        Args:
            words: Sums modulo q of the words of ciphertexts, one ciphertext after the other; shape
                (ciphertexts * CIPHERTEXT_WORDS,).

        Returns:
            The sums, of which the lowest P bits count; shape (ciphertexts * DEGREE,).

        Raises:
            ProtocolError: If the words are not those of ciphertexts.
        """
        return self.round(self.coefficients(words))

    def coefficients(self, words: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The decrypted coefficients, centred modulo q: Delta times the sum plus the error.

        Shapes are those of :meth:`decrypt`. The errors must not leave the members: with them the
        key follows from ciphertexts by linear algebra (Li and Micciancio 2021).

        Raises:
            ProtocolError: If the words are not those of ciphertexts.
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
        centred = np.empty(len(words) // CIPHERTEXT_WORDS * DEGREE, dtype=np.int64)
        for start in range(0, len(centred), CIPHERTEXT_WORDS):
            piece = centred[start : start + CIPHERTEXT_WORDS]
            opened = self._opened(words[2 * start : 2 * (start + len(piece))])
            piece[:] = opened.view(np.int64)[: len(piece)]
        centred -= (centred > ring.prime // 2) * np.int64(ring.prime)
        return centred

    def _opened(self, words: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The coefficients of one ciphertext or of two; shape (CIPHERTEXT_WORDS,).

        SEAL transforms ciphertexts out of NTT form, but not plaintexts. So one plaintext is put in
        the place of c0 of a ciphertext, and a second one in the place of its c1.
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
        # SEAL refuses a ciphertext or a result whose c1 is zero, and perhaps more.
        except Exception as error:
            raise ProtocolError("SEAL refuses to decrypt a ciphertext: it was altered") from error
        evaluator.transform_from_ntt_inplace(opened)
        return self.ring.words(opened)

    def _plain(self, words: NDArray[np.uint64]) -> Any:
        ciphertext, plain = self.ring.ciphertext(self.prefix, words), _sealapi().Plaintext()
        self.ring.evaluator.transform_to_ntt_inplace(ciphertext)
        self._decryptor.decrypt(ciphertext, plain)
        return plain

    def round(self, coefficients: NDArray[np.int64]) -> NDArray[np.uint64]:
        """The coefficients divided by Delta and rounded to the nearest integer; same shape."""
        shift = self.parameters.delta_bits
        rounded = (coefficients + np.int64(1 << (shift - 1))) >> np.int64(shift)
        return rounded.view(np.uint64)
