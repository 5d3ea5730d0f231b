"""Whether words of a key are in the memory of a process (Linux):
`python -m privacy_audits.targets.memory PID FILE`.

FILE holds the key, whose last 4096 numbers of 64 bits are random. Printed is a JSON object: how
many of them were found, and whether the same search finds them in this process, which holds them.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_WORDS = 4096
_PIECE = 64 << 20
_LOW = np.uint64((1 << 20) - 1)


def key_words(secret: bytes) -> NDArray[np.uint64]:
    """The random numbers of a key, sorted; those that are small enough to occur by chance left
    out.
    """
    words = np.unique(np.frombuffer(secret[-8 * _WORDS :], dtype=np.uint64))
    return words[words > 1 << 40]


def pieces(pid: int) -> Iterator[bytes]:
    """The readable memory of a process.

    Raises:
        OSError: If this process may not read it.
    """
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps.readlines():
            region = re.match(r"([0-9a-f]+)-([0-9a-f]+) r\S+ \S+ \S+ \S+ *(.*)", line)
            if region is None or region[3].startswith(("[vvar", "[vsyscall")):
                continue
            start, end = int(region[1], 16), int(region[2], 16)
            while start < end:
                try:
                    memory.seek(start)
                    data = memory.read(min(end - start, _PIECE))
                except OSError:
                    break  # a region that is gone, or of a device
                yield data
                start += len(data) or end


def present(pid: int, words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Which of ``words``, sorted, are in the memory of a process as aligned numbers of 64 bits.

    Raises:
        OSError: If this process may not read it.
    """
    found = np.zeros(len(words), dtype=bool)
    # Most numbers are ruled out by their lowest bits, which is quicker than to search for them.
    low = np.zeros(1 << 20, dtype=bool)
    low[words & _LOW] = True
    for data in pieces(pid):
        values = np.frombuffer(data[: len(data) // 8 * 8], dtype=np.uint64)
        values = values[low[values & _LOW]]
        positions = np.searchsorted(words, values)
        positions[positions == len(words)] = 0
        found[positions[words[positions] == values]] = True
    return words[found]


def main(arguments: Sequence[str]) -> None:
    """Search, and print what was found."""
    words = key_words(Path(arguments[1]).read_bytes())
    found = len(present(int(arguments[0]), words))
    control = len(present(os.getpid(), words)) == len(words) > 0
    sys.stdout.write(json.dumps({"found": found, "control": control}))


if __name__ == "__main__":
    main(sys.argv[1:])
