"""Encrypted sums of flat vectors: CKKS and the sealing of its key. Knows nothing of learning or of transports.

The interface the rest of privfl uses is small on purpose:

* a key holder makes a :class:`SumKey`, encrypts a vector to blocks and decrypts summed blocks;
* whoever only adds holds an :class:`Adder`, made from :meth:`SumKey.adding_context`, which contains no secret;
* :class:`SealingKey` carries a secret from one site to another past a relay.
"""

from privfl.secagg.ckks import Adder, SumKey
from privfl.secagg.sealing import SealingKey

__all__ = ["Adder", "SealingKey", "SumKey"]
