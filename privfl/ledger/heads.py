"""The head of a ledger: how many rows it had, and the hash that stands for all of them.

A site that was shown a head can tell later whether rows are missing. The chain of hashes alone
looks whole when its tail was cut off or a backup was restored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Head:
    """The state of a ledger at one moment.

    Attributes:
        ledger: the name of the ledger, random, in hexadecimal.
        rows: how many rows it had.
        hash: the hash of the last of these rows, in hexadecimal.
    """

    ledger: str
    rows: int
    hash: str

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Head:
        """The head among the fields of a log record; other fields are passed over.

        Raises:
            KeyError: If a field of the head is missing.
            ValueError: If the number of rows is not a number.
            TypeError: If ``fields`` is not a mapping, or the number of rows is null or a list.
        """
        return cls(str(fields["ledger"]), int(fields["rows"]), str(fields["hash"]))


def head_bytes(head: Head, run: str, round_: int, attempt: int) -> bytes:
    """What a site signs when it shows its head.

    Args:
        head: the head that is shown.
        run: the run in which it is shown, in hexadecimal.
        round_: the round of that run.
        attempt: how many sums were made in the round before. It tells the head after the last
            release of metrics from the one before it, which a relay could otherwise show again.
    """
    return json.dumps(
        ["privfl ledger head 1", head.ledger, head.rows, head.hash, run, round_, attempt]
    ).encode()
