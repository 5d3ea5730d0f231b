"""Heads of ledgers: what a site shows to the others, and what a relay, a cut or an old copy can
do to it.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from privfl.federation.messages import Kind, decode
from tests.conftest import call_cli, run_twin
from tests.ledgers import PRIVATE

pytestmark = pytest.mark.usefixtures("trainers_as_threads")


def test_heads_are_shown_and_found_again(small: Path, tmp_path: Path, sites: Path):
    twin = run_twin(small, output=tmp_path / "runs", ranks=3, sites=sites)
    assert twin.codes == [0, 0, 0], twin.err
    ledger = tmp_path / "aa.ledger"
    good = call_cli("budget", "verify", ledger, twin.folder)
    assert (good.code, good.err) == (0, ""), good.err
    # Both sites wrote down the heads of each other.
    for site in ("aa", "bbb"):
        notes = (twin.folder / "sites" / site / "heads.jsonl").read_text().splitlines()
        assert [sorted(json.loads(note)["heads"]) for note in notes] == [["aa", "bbb"]] * 3
    backup = tmp_path / "backup.ledger"
    shutil.copy(ledger, backup)
    with sqlite3.connect(ledger) as file:
        file.execute("DELETE FROM rows WHERE number = (SELECT max(number) FROM rows)")
    file.close()
    assert call_cli("budget", "verify", ledger).code == 0, (
        "a chain alone does not show a tail that was cut"
    )
    for witness in (
        twin.folder,
        twin.folder / "rounds.jsonl",
        twin.folder / "sites" / "bbb" / "heads.jsonl",
    ):
        cut = call_cli("budget", "verify", ledger, witness)
        assert cut.code == 2
        assert "NOT VERIFIED" in cut.err
        assert "is missing at the end" in cut.err
        assert cut.err.count("\n") == 1
    shown = call_cli("budget", "show", ledger, "--heads", twin.folder)
    assert shown.code == 2
    assert "NOT VERIFIED" in shown.out
    # A backup from before the second run.
    shutil.copy(backup, ledger)
    assert run_twin(small, output=tmp_path / "more", ranks=3, sites=sites).codes == [0, 0, 0]
    assert call_cli("budget", "verify", ledger, tmp_path / "more", twin.folder).code == 0
    shutil.copy(backup, ledger)
    restored = call_cli("budget", "verify", ledger, tmp_path / "more")
    assert restored.code == 2
    assert "missing at the end" in restored.err


TRICKS = ["forged", "swapped", "old", "stale"]


@pytest.mark.parametrize("trick", TRICKS)
def test_a_relay_cannot_invent_heads(small: Path, tmp_path: Path, trick: str):
    from privfl.transport import Transport

    class Relay:
        """Rank 0's transport with one lie in the first message that relays heads, or the first
        round's heads again in the second.
        """

        def __init__(self, inner: Transport) -> None:
            self._inner, self._first = inner, None

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def send(self, rank: int, head: bytes, bulk: Any) -> None:
            message = decode(head, bulk)
            if (
                self._inner.rank == 0
                and message.kind in (Kind.SUM, Kind.FINISH)
                and message.body.heads
            ):
                body = json.loads(bytes(bulk))
                if trick == "forged":
                    body["heads"]["bbb"]["rows"] += 1
                elif trick == "swapped":
                    body["heads"]["aa"] = body["heads"]["bbb"]
                elif message.kind is Kind.SUM and message.round == (1 if trick == "old" else 2):
                    self._first = body["heads"]
                elif trick == "old" or message.kind is Kind.FINISH:
                    body["heads"] = self._first or body["heads"]
                bulk = json.dumps(body).encode()
            self._inner.send(rank, head, bulk)

    twin = run_twin(small, PRIVATE, output=tmp_path / "runs", ranks=3, wrap=Relay)
    assert twin.codes == [1, 1, 1]
    assert "is not signed by it" in twin.err


def test_a_ledger_that_went_back_is_noticed_by_the_other_sites(
    small: Path, tmp_path: Path, sites: Path
):
    """A site that put back an old copy between two runs: the others remember what it showed
    them.
    """
    for site in ("aa", "bbb"):
        with open(sites / f"{site}.yaml", "a") as file:
            file.write(f"output: ../of_{site}\n")
    assert run_twin(small, output=tmp_path / "first", ranks=3, sites=sites).codes == [0, 0, 0]
    shutil.copy(tmp_path / "aa.ledger", tmp_path / "backup")
    assert run_twin(small, output=tmp_path / "second", ranks=3, sites=sites).codes == [0, 0, 0]
    shutil.copy(tmp_path / "backup", tmp_path / "aa.ledger")
    (tmp_path / "of_aa" / "heads.jsonl").unlink()
    twin = run_twin(small, output=tmp_path / "third", ranks=3, sites=sites)
    assert twin.codes == [1, 1, 1]
    assert "site bbb: the ledger of site aa went back" in twin.err
