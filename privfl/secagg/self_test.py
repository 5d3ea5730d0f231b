"""The self-proof: what the encryption rests on is shown to hold on this machine, with this
TenSEAL, before a run uses it.
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from privfl.errors import MismatchError, PrivflError
from privfl.secagg.adders import Adder, EvaluatorAdder, WordAdder
from privfl.secagg.checksum import Checksum
from privfl.secagg.ckks import SumKey
from privfl.secagg.codec import Decryption, encrypt
from privfl.secagg.key_exchange import ExchangeKey
from privfl.secagg.keystream import KEY_BYTES
from privfl.secagg.layout import Layout
from privfl.secagg.masks import Pairs
from privfl.secagg.packing import centred, pack
from privfl.secagg.parameters import CIPHERTEXT_WORDS, derive
from privfl.secagg.quantise import BoundedIntegers

_MEMBERS, _BITS, _VALUES = 3, 20, 3000


def prove() -> bool:
    """Sum three masked, encrypted vectors, and look whether each stage does what the others rely
    on.

    Returns:
        Whether the sum of ciphertexts' words is, word for word, what TenSEAL's evaluator gives; if
        not, sums must be made with the evaluator (:class:`EvaluatorAdder`).

    Raises:
        PrivflError: sums are wrong, masks do not hide or do not cancel, or a wrong set of members,
            or another key, decodes.
    """
    parameters = derive(_MEMBERS, _BITS)
    key, check = SumKey(parameters), os.urandom(KEY_BYTES)
    vectors = np.random.default_rng().integers(
        -parameters.largest_value, parameters.largest_value, (_MEMBERS, _VALUES), endpoint=True
    )
    vectors[0, :2] = parameters.largest_value, -parameters.largest_value
    blocks = _contributions(vectors, key, check)
    by_words = _added(WordAdder(parameters), blocks)
    by_evaluator = _added(EvaluatorAdder(parameters), blocks)
    words_add = by_words == by_evaluator
    total = _decoded(by_words if words_add else by_evaluator, key, check)
    if total is None or not np.array_equal(total, vectors.sum(axis=0)):
        raise PrivflError(
            "the encryption probe failed: a sum of three vectors is wrong; reinstall tenseal"
        )
    if any(_shows(vector, block, key) for vector, block in zip(vectors, blocks, strict=True)):
        raise PrivflError("the encryption probe failed: masks hide nothing; reinstall cryptography")
    adder = WordAdder(parameters) if words_add else EvaluatorAdder(parameters)
    if _decoded(_added(adder, blocks[:2]), key, check) is not None:
        raise PrivflError(
            "the encryption probe failed: the sum of a wrong set of members decodes; reinstall "
            "cryptography"
        )
    if _decoded(by_evaluator, SumKey(parameters), check) is not None:
        raise PrivflError(
            "the encryption probe failed: another key decrypts the sum; reinstall tenseal"
        )
    return words_add


def _contributions(vectors: NDArray[np.int64], key: SumKey, check: bytes) -> list[bytes]:
    members = [ExchangeKey() for _ in vectors]
    public = [member.public for member in members]
    blocks = []
    for member, vector in zip(members, vectors, strict=True):
        masks, checksum = (
            Pairs(member, public).masks(1, 1, b"probe"),
            Checksum(check, key.parameters),
        )
        blocks += [
            block.tobytes()
            for block in encrypt(vector, BoundedIntegers(key.parameters), checksum, masks, key)
        ]
    return blocks


def _added(adder: Adder, blocks: list[bytes]) -> bytes:
    adder.open(Layout(_VALUES, derive(_MEMBERS, _BITS)))
    for block in blocks:
        adder.add(0, block)
    return bytes(adder.block(0))


def _decoded(block: bytes, key: SumKey, check: bytes) -> NDArray[np.int64] | None:
    """What a sum decodes to; None where the members would refuse it."""
    decryption = Decryption(_VALUES, Checksum(check, key.parameters), key)
    try:
        decryption.add(block)
        return decryption.totals()
    except MismatchError:
        return None


def _shows(vector: NDArray[np.int64], block: bytes, key: SumKey) -> bool:
    """Whether a key holder reads a single contribution; by chance one integer in 2^44 is right."""
    integers = key.decrypt(np.frombuffer(block, dtype="<u8")[:CIPHERTEXT_WORDS])
    packed = pack(vector.astype(np.float64), key.parameters)
    bits = key.parameters.word_bits
    return bool((centred(integers[: len(packed)], bits) == centred(packed, bits)).mean() > 0.01)
