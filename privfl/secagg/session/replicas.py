"""Replicas that differ by rounding are made equal: one site sends its own to the others, sealed,
and they take it if it is near enough to theirs.
"""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray

from privfl.errors import PrivflError, ProtocolError
from privfl.secagg.session.keys import RunKeys

# Relative to the largest parameter: about a hundred times the rounding of float32, and far less
# than a step changes.
_TOLERANCE = 2.0**-16


def tag(keys: RunKeys, facts: object, replica: NDArray[np.float32]) -> str:
    """A keyed digest of a replica and of ``facts`` (as JSON), which must be the same at every site;
    in hexadecimal.

    Guarantee: the digest does not help anybody without the keys of the run to test a guess of the
    replica.
    """
    return keys.tag(json.dumps(facts), replica.tobytes())


def seal(keys: RunKeys, replica: NDArray[np.float32], context: bytes) -> bytes:
    """The replica, sealed so that only sites of the run can read it. ``context`` names run and
    round.
    """
    return keys.seal_note(replica.astype("<f4").tobytes(), context)


def open_near(
    keys: RunKeys, sealed: bytes, own: NDArray[np.float32], context: bytes
) -> NDArray[np.float32]:
    """The replica that another site sealed, if it differs from this site's by rounding only.

    Args:
        keys: The keys of the run.
        sealed: The other site's replica, from :func:`seal`.
        own: This site's replica; shape (parameters,).
        context: What it was sealed for.

    Returns:
        The other site's replica; shape (parameters,).

    Raises:
        ProtocolError: If ``sealed`` was altered, or is of another round or model.
        PrivflError: If the replicas differ by more than rounding explains.
    """
    lent = np.frombuffer(keys.open_note(sealed, context), dtype="<f4")
    if lent.shape != own.shape:
        raise ProtocolError("a site lent a replica of another model")
    distance = float(np.abs(lent.astype(np.float64) - own).max(initial=0.0))
    allowed = _TOLERANCE * float(np.abs(own).max(initial=0.0))
    if not distance <= allowed:
        raise PrivflError(
            f"the sites' replicas differ by up to {distance:.3g}, more than rounding explains "
            f"({allowed:.3g}): do all run the same model code and versions of torch?"
        )
    return lent.astype(np.float32)
