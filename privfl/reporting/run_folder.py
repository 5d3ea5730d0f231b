"""The folder of one run: resolved experiment, one line a round, summary."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from privfl.errors import PrivflError


class RunFolder:
    """Writes ``experiment.yaml``, ``rounds.jsonl``, the report and ``summary.json``; every file
    is whole or not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, resolved_experiment: str) -> None:
        """Make the folder.

        Raises:
            PrivflError: If the folder exists already or cannot be made.
        """
        try:
            self.path.mkdir(parents=True)
        except OSError as error:
            raise PrivflError(
                f"cannot create the run folder {self.path}: {error.strerror}; choose another with "
                "--output"
            ) from error
        self._write("experiment.yaml", resolved_experiment)

    def add_round(self, record: dict[str, Any]) -> None:
        """Append one round to ``rounds.jsonl`` and see it to the disk.

        Raises:
            PrivflError: If the file cannot be written.
        """
        path = self.path / "rounds.jsonl"
        with _writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_report(self, as_json: str, as_html: str) -> None:
        """Write ``report.json`` and ``report.html``.

        Raises:
            PrivflError: If a file cannot be written.
        """
        self._write("report.json", as_json)
        self._write("report.html", as_html)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``: its presence says that the run succeeded.

        Raises:
            PrivflError: If the file cannot be written.
        """
        self._write("summary.json", json.dumps(summary, indent=2) + "\n")

    def _write(self, name: str, text: str) -> None:
        unfinished = self.path / f".{name}"
        with _writing(self.path / name):
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, self.path / name)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn a full disk or a missing folder into one sentence."""
    try:
        yield
    except OSError as error:
        raise PrivflError(f"cannot write {path}: {error.strerror}") from error
