"""Keeping other processes out of this one's memory; transports must work in spite of it."""

from __future__ import annotations

import ctypes
import resource
import sys

from privfl.errors import InternalError

_PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 3, 4


def forbid_reading() -> None:
    """Make this process leave no core file and, on Linux, unreadable for other processes.

    Guarantee: afterwards, on Linux, no process of the same user can read this process's memory or
    trace it; root can.

    Raises:
        InternalError: If the system did not make the process unreadable.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        library = ctypes.CDLL(None, use_errno=True)
        library.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
        if library.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) != 0:
            raise InternalError(
                "this process could not be made unreadable for others (PR_SET_DUMPABLE)"
            )
