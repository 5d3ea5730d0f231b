"""Integers to ciphertext words and back: quantiser, packing, masks, CKKS, checksum, keys.

Knows nothing of learning or of transports.

The stages stand in this order (why: docs/secure-aggregation.md), each in a module of its own:

1. ``quantise``: numbers to integers on a public grid
2. ``packing``: two values in one integer
3. ``masks``: pairwise masks modulo 2^P
4. ``ckks``: encryption, exact
5. ``adding``: sums of words, by whoever holds no key
6. ``ckks`` again, ``packing``, ``checksum``: decrypt, unpack, check

``codec`` joins them for a member, ``parameters`` derives what all must agree on.
"""

from privfl.secagg.adders import Adder, EvaluatorAdder, WordAdder
from privfl.secagg.checksum import Checksum
from privfl.secagg.ckks import SumKey
from privfl.secagg.codec import Decryption, encrypt
from privfl.secagg.key_exchange import ExchangeKey
from privfl.secagg.layout import Layout
from privfl.secagg.masks import Masks, Pairs
from privfl.secagg.parameters import Parameters, derive, usual_value_bits
from privfl.secagg.quantise import BoundedIntegers, FixedPoint

__all__ = [
    "Adder",
    "BoundedIntegers",
    "Checksum",
    "Decryption",
    "EvaluatorAdder",
    "ExchangeKey",
    "FixedPoint",
    "Layout",
    "Masks",
    "Pairs",
    "Parameters",
    "SumKey",
    "WordAdder",
    "derive",
    "encrypt",
    "usual_value_bits",
]
