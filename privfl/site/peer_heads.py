"""What the other sites show of their ledgers: checked, and written down where it outlives the
run.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from privfl.errors import PrivflError, ProtocolError
from privfl.federation.messages import SignedHead
from privfl.identity import verify
from privfl.ledger import Head, head_bytes
from privfl.site.artifacts import open_log


class PeerHeads:
    """The last head that each site ever showed here, kept in ``heads.jsonl``.

    Args:
        folder: the site's folder for results, in which the file lies.
        run: the run, in hexadecimal.
        identities: the public identity of every member of the run, by site.
    """

    def __init__(self, folder: Path, run: str, identities: Mapping[str, str]) -> None:
        self._path, self._run, self._identities = folder / "heads.jsonl", run, identities
        self._last = _heads_before(self._path)
        # Which ledger each site has in this run.
        self._ledgers: dict[str, str] = {}

    def keep(self, round_: int, attempt: int, heads: Mapping[str, SignedHead]) -> None:
        """Check the heads of all members and write them down.

        Raises:
            ProtocolError: If a head is missing, forged, or behind an earlier one.
            PrivflError: If they cannot be written.
        """
        if set(heads) != set(self._identities):
            raise ProtocolError(
                "the coordinator relays heads of other ledgers than those of this run's members"
            )
        for site, shown in heads.items():
            head = Head(shown.ledger, shown.rows, shown.hash)
            try:
                signed = head_bytes(head, self._run, round_, attempt)
                verify(self._identities[site], bytes.fromhex(shown.signature), signed)
            except (ProtocolError, ValueError) as error:
                raise ProtocolError(
                    f"the head of the ledger of site {site} is not signed by it"
                ) from error
            before = self._last.get((site, head.ledger), head)
            back = head.rows < before.rows or (
                head.rows == before.rows and head.hash != before.hash
            )
            if back or self._ledgers.setdefault(site, head.ledger) != head.ledger:
                raise ProtocolError(
                    f"the ledger of site {site} went back: rows that it had shown to this site are "
                    "gone"
                )
            self._last[site, head.ledger] = head
        shown_heads = {site: head.model_dump() for site, head in heads.items()}
        self._write({"run": self._run, "round": round_, "heads": shown_heads})

    def _write(self, record: dict[str, Any]) -> None:
        try:
            with open_log(self._path) as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise PrivflError(f"cannot write {self._path}: {error.strerror}") from error


def _heads_before(path: Path) -> dict[tuple[str, str], Head]:
    """What earlier runs wrote down in ``path``, by site and ledger.

    A line that a crash cut off is passed over, and ended so that the next one is whole.
    """
    last: dict[tuple[str, str], Head] = {}
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text and not text.endswith("\n"):
        with open_log(path) as file:
            file.write("\n")
    for line in text.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            for site, shown in json.loads(line)["heads"].items():
                head = Head.from_dict(shown)
                if (site, head.ledger) not in last or head.rows >= last[site, head.ledger].rows:
                    last[site, head.ledger] = head
    return last
