"""What tests of whole runs ask the ledgers that these leave."""

from __future__ import annotations

from pathlib import Path

from privfl.ledger import Ledger
from tests.conftest import Twin

PRIVATE = "evaluation={metrics: {accuracy: 'task.py:accuracy'}, target_epsilon: 20, every: 1}"


def read(path: Path) -> Ledger:
    with Ledger.read(path) as opened:
        return opened


def run_ledgers(twin: Twin) -> dict[str, Path]:
    return {path.parent.name: path for path in twin.folder.rglob("*.ledger")}
