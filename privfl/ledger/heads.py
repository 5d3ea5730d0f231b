"""The head of a book: how many rows it had, and the hash that stands for all of them.

Whoever was shown a head can tell later whether rows are missing: a chain alone looks whole when its
tail was cut or a backup was restored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Head:
    """``ledger``: the book's own name, random; ``rows``: how many; ``hash``: of the last row, in
    hexadecimal.
    """

    ledger: str
    rows: int
    hash: str

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Head:
        """The head in a log, among whatever else stands there.

        Raises:
            KeyError, ValueError, TypeError: there is none.
        """
        return cls(str(fields["ledger"]), int(fields["rows"]), str(fields["hash"]))


def head_bytes(head: Head, run: str, round_: int, attempt: int) -> bytes:
    """What a site signs when it shows its head in a round of a run (hexadecimal), after so many
    sums in it.

    The number of sums tells the head after the last release of metrics from that before it, which a
    relay could show again.
    """
    return json.dumps(
        ["privfl ledger head 1", head.ledger, head.rows, head.hash, run, round_, attempt]
    ).encode()
