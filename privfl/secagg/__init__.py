"""Secure aggregation: vectors to masked, encrypted words and their sum back to numbers.

Knows nothing of learning or of transports.

The stages stand in this order (why: docs/secure-aggregation.md), each in a module of its own:

1. ``quantise``: numbers to integers on a public grid
2. ``packing``: two values in one integer
3. ``masks``: pairwise masks modulo 2^P
4. ``ckks``: encryption, exact
5. ``adders``: sums of ciphertext words, without a key
6. ``ckks``, ``packing`` and ``checksum``: decrypt, unpack, check

``codec`` joins the stages of a member, ``parameters`` derives what all members must agree on,
``self_test`` shows that all of it holds on this machine. What the sites of one run share is in
``session``.
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
