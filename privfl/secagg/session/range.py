"""The range of a round's updates on which the sites agree: a power of two above the largest element
of all sites' updates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from privfl.errors import ProtocolError
from privfl.secagg.session.keys import RunKeys

# Exponents of updates, which are float32, are between -148 and 128.
_LEAST = 256


def seal_exponent(keys: RunKeys, vector: NDArray[np.float64], context: bytes) -> str:
    """The least e with |x| < 2^e for all x of ``vector``, sealed for all sites; in hexadecimal.

    Args:
        keys: The keys of the run.
        vector: This site's update; shape (parameters,).
        context: Names site and round; :func:`agreed_range` needs the same.
    """
    largest = float(np.abs(vector).max()) if len(vector) else 0.0
    exponent = int(np.frexp(largest)[1]) if largest else -_LEAST
    return keys.seal_note(
        min(max(exponent, -_LEAST), _LEAST - 1).to_bytes(2, "big", signed=True), context
    ).hex()


def agreed_range(
    keys: RunKeys, sealed: Mapping[str, str], sites: Sequence[str], context: Callable[[str], bytes]
) -> float:
    """The power of two that bounds the updates of all sites.

    Args:
        keys: The keys of the run.
        sealed: The sealed exponents, by site.
        sites: The sites that must be there.
        context: Returns the context in which the exponent of a site was sealed.

    Raises:
        ProtocolError: If ``sealed`` is not of exactly ``sites``, or an exponent was altered or is
            that of another site or round.
    """
    if set(sealed) != set(sites):
        raise ProtocolError(
            "the coordinator does not relay a range of every site, but they must agree on one"
        )
    exponents = []
    for site, text in sealed.items():
        try:
            note = keys.open_note(bytes.fromhex(text), context(site))
        except ValueError as error:
            raise ProtocolError("a sealed range is not in hexadecimal") from error
        exponents.append(int.from_bytes(note, "big", signed=True))
    return float(2.0 ** max(exponents))
