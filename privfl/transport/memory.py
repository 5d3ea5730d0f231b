"""Keeping other processes out of this one's memory, which transports must be able to live with."""

from __future__ import annotations

import ctypes
import resource
import sys

from privfl.errors import InternalError

_PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 3, 4


def forbid_reading() -> None:
    """No core file of this process, and on Linux no reading of its memory by other processes of
    the same user (only by root).

    Raises:
        InternalError: the system did not do it.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        library = ctypes.CDLL(None, use_errno=True)
        library.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
        if library.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) != 0:
            raise InternalError(
                "this process could not be made unreadable for others (PR_SET_DUMPABLE)"
            )
