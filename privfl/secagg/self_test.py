"""The self-test: before a run uses the encryption, the properties it rests on are shown to hold on
this machine and with this TenSEAL.
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
    """Sum three masked and encrypted vectors, and check that each stage does what the others rely
    on.

    Returns:
        Whether sums of ciphertexts' words are, word for word, the sums of TenSEAL's evaluator. If
        not, :class:`EvaluatorAdder` must add.

    Raises:
        PrivflError: If a sum is wrong, if masks do not hide or do not cancel, or if the sum of a
            wrong set of members decodes, or any sum under another key.
    """
    parameters = derive(_MEMBERS, _BITS)
    key, checksum_key = SumKey(parameters), os.urandom(KEY_BYTES)
    vectors = np.random.default_rng().integers(
        -parameters.largest_value, parameters.largest_value, (_MEMBERS, _VALUES), endpoint=True
    )
    vectors[0, :2] = parameters.largest_value, -parameters.largest_value
    blocks = _contributions(vectors, key, checksum_key)
    by_words = _added(WordAdder(parameters), blocks)
    by_evaluator = _added(EvaluatorAdder(parameters), blocks)
    words_add = by_words == by_evaluator
    total = _decoded(by_words if words_add else by_evaluator, key, checksum_key)
    if total is None or not np.array_equal(total, vectors.sum(axis=0)):
        raise PrivflError(
            "the encryption probe failed: a sum of three vectors is wrong; reinstall tenseal"
        )
    if any(_shows(vector, block, key) for vector, block in zip(vectors, blocks, strict=True)):
        raise PrivflError("the encryption probe failed: masks hide nothing; reinstall cryptography")
    adder = WordAdder(parameters) if words_add else EvaluatorAdder(parameters)
    if _decoded(_added(adder, blocks[:2]), key, checksum_key) is not None:
        raise PrivflError(
            "the encryption probe failed: the sum of a wrong set of members decodes; reinstall "
            "cryptography"
        )
    if _decoded(by_evaluator, SumKey(parameters), checksum_key) is not None:
        raise PrivflError(
            "the encryption probe failed: another key decrypts the sum; reinstall tenseal"
        )
    return words_add


def _contributions(vectors: NDArray[np.int64], key: SumKey, checksum_key: bytes) -> list[bytes]:
    members = [ExchangeKey() for _ in vectors]
    public = [member.public for member in members]
    blocks = []
    for member, vector in zip(members, vectors, strict=True):
        masks = Pairs(member, public).masks(1, 1, b"probe")
        checksum = Checksum(checksum_key, key.parameters)
        contribution = encrypt(vector, BoundedIntegers(key.parameters), checksum, masks, key)
        blocks += [block.tobytes() for block in contribution]
    return blocks


def _added(adder: Adder, blocks: list[bytes]) -> bytes:
    adder.open(Layout(_VALUES, derive(_MEMBERS, _BITS)))
    for block in blocks:
        adder.add(0, block)
    return bytes(adder.block(0))


def _decoded(block: bytes, key: SumKey, checksum_key: bytes) -> NDArray[np.int64] | None:
    """The decrypted sum; None if the members would refuse it."""
    decryption = Decryption(_VALUES, Checksum(checksum_key, key.parameters), key)
    try:
        decryption.add(block)
        return decryption.totals()
    except MismatchError:
        return None


def _shows(vector: NDArray[np.int64], block: bytes, key: SumKey) -> bool:
    """Whether a key holder reads a single contribution; by chance, one integer in 2^44 is right."""
    integers = key.decrypt(np.frombuffer(block, dtype="<u8")[:CIPHERTEXT_WORDS])
    packed = pack(vector.astype(np.float64), key.parameters)
    bits = key.parameters.word_bits
    return bool((centred(integers[: len(packed)], bits) == centred(packed, bits)).mean() > 0.01)
