"""Members of a sum in one process: what each sends, what the adding side makes of it, what it
decodes to.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from privfl.secagg import (
    Adder,
    BoundedIntegers,
    Checksum,
    Decryption,
    ExchangeKey,
    Layout,
    Pairs,
    Parameters,
    SumKey,
    WordAdder,
    derive,
    encrypt,
)
from privfl.secagg.quantise import Quantiser


class Members:
    """Members with keys of their own; each sum is a new attempt."""

    def __init__(self, count: int, value_bits: int) -> None:
        self.parameters: Parameters = derive(count, value_bits)
        self.key = SumKey(self.parameters)
        self.exchange = [ExchangeKey() for _ in range(count)]
        self.pairs = [
            Pairs(own, [other.public for other in self.exchange]) for own in self.exchange
        ]
        self.attempt = 0
        self.check = os.urandom(32)

    def masks(self, number: int, transcript: bytes = b"transcript"):
        return self.pairs[number].masks(1, self.attempt, transcript)

    def contributions(
        self, vectors: Sequence[np.ndarray], quantiser: Quantiser | None = None
    ) -> list[list[np.ndarray]]:
        """The blocks of every member, in a new attempt."""
        self.attempt += 1
        quantiser = quantiser or BoundedIntegers(self.parameters)
        return [
            list(
                encrypt(
                    vector,
                    quantiser,
                    Checksum(self.check, self.parameters),
                    self.masks(number),
                    self.key,
                )
            )
            for number, vector in enumerate(vectors)
        ]

    def add(
        self, contributions: Sequence[list[np.ndarray]], length: int, adder: Adder | None = None
    ) -> list[bytes]:
        adder = adder or WordAdder(self.parameters)
        layout = Layout(length, self.parameters)
        adder.open(layout)
        for blocks in contributions:
            for index, block in enumerate(blocks):
                adder.add(index, block.data.cast("B"))
        return [bytes(adder.block(index)) for index in range(layout.blocks)]

    def decode(self, blocks: Sequence[bytes], length: int) -> np.ndarray:
        """The checked totals; MismatchError where the members would refuse them."""
        decryption = Decryption(length, Checksum(self.check, self.parameters), self.key)
        for block in blocks:
            decryption.add(block)
        return decryption.totals()

    def sum(self, vectors: Sequence[np.ndarray]) -> np.ndarray:
        length = len(vectors[0])
        return self.decode(self.add(self.contributions(vectors), length), length)

    def integers(self, contributions: Sequence[list[np.ndarray]], length: int) -> np.ndarray:
        """What a key holder reads in the sum of any contributions, modulo 2^P: masked packed
        integers.
        """
        modulus = np.uint64((1 << self.parameters.word_bits) - 1)
        rows = np.concatenate(
            [
                np.frombuffer(block, dtype="<u8").reshape(-1, 8192)
                for block in self.add(contributions, length)
            ]
        )
        return np.concatenate([self.key.decrypt(row) & modulus for row in rows])
