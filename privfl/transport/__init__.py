"""Frames and sums of words between ranks, over MPI or between threads.

Knows nothing of what it carries. The MPI module is imported only where it is used.
"""

from privfl.transport.base import CHUNK, HEAD_LIMIT, Frame, Reduction, Transport, finish
from privfl.transport.inprocess import connect
from privfl.transport.memory import forbid_reading
from privfl.transport.recording import Recorded, Recording

__all__ = [
    "CHUNK",
    "HEAD_LIMIT",
    "Frame",
    "Recorded",
    "Recording",
    "Reduction",
    "Transport",
    "connect",
    "finish",
    "forbid_reading",
]
