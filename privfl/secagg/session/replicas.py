"""Replicas that differ by rounding: one site lends its own to the others, sealed, and they take
it if it is near enough.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfl.errors import PrivflError, ProtocolError
from privfl.secagg.session.keys import RunKeys

# Of the largest parameter: some hundred times the rounding of float32, and far below what a step
# moves.
_TOLERANCE = 2.0**-16


def tag(keys: RunKeys, facts: Any, replica: NDArray[np.float32]) -> str:
    """A keyed digest of a replica and of ``facts``, as JSON, that must be the same at every
    site; in hexadecimal.

    Without the sites' key nobody can test a guess of the replica.
    """
    return keys.tag(json.dumps(facts), replica.tobytes())


def seal(keys: RunKeys, replica: NDArray[np.float32], context: bytes) -> bytes:
    """The replica for the other sites' eyes alone. ``context`` names run and round."""
    return keys.seal_note(replica.astype("<f4").tobytes(), context)


def open_near(
    keys: RunKeys, sealed: bytes, own: NDArray[np.float32], context: bytes
) -> NDArray[np.float32]:
    """The replica that another site lent, if it is this site's ``own`` but for rounding; shape
    (parameters,).

    Raises:
        ProtocolError: it was altered, or is of another round or model.
        PrivflError: it is too far away for rounding to explain.
    """
    lent = np.frombuffer(keys.open_note(sealed, context), dtype="<f4")
    if lent.shape != own.shape:
        raise ProtocolError("a site lent a replica of another model")
    distance = float(np.abs(lent.astype(np.float64) - own).max(initial=0.0))
    allowed = _TOLERANCE * float(np.abs(own).max(initial=0.0))
    if not distance <= allowed:
        raise PrivflError(
            f"the sites' replicas differ by up to {distance:.3g}, more than rounding explains "
            f"({allowed:.3g}): do all run the same model code and "
            "versions of torch?"
        )
    return lent.astype(np.float32)
