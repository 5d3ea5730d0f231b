"""Moving frames between ranks.

Knows nothing of what it carries; the MPI module is imported only when it is asked for.
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
