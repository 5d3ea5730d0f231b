"""Which audits notice which defects, and how often."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from privacy_audits.bounds import clopper_pearson
from privacy_audits.registry import AUDITS, Workshop
from privacy_audits.result import AuditResult, Verdict
from privacy_audits.sabotage import defects
from privacy_audits.sabotage.apply import REACHED, Defect, reached
from privfl.errors import PrivflError

_CONFIDENCE = 0.95


@dataclass
class Row:
    """One defect.

    Attributes:
        defect: its name.
        seen_by: the audits that must notice it.
        planted: how often it was planted.
        reached: how often every patch of it was called.
        stopped: how often privfl itself refused to go on.
        noticed: by audit, how often a claim was refuted.
    """

    defect: str
    seen_by: tuple[str, ...]
    planted: int = 0
    reached: int = 0
    stopped: int = 0
    noticed: dict[str, int] = field(default_factory=dict)

    @property
    def seen(self) -> bool:
        """Whether every planted defect was reached, and noticed by an audit that must."""
        best = max((self.noticed.get(name, 0) for name in self.seen_by), default=0)
        return self.reached == self.planted and best + self.stopped >= 0.95 * self.planted

    def line(self) -> str:
        """The row as text."""
        cells = [f"{name} {self.noticed.get(name, 0)}/{self.planted}" for name in self.noticed]
        stopped = f", stopped by privfl {self.stopped}/{self.planted}" if self.stopped else ""
        planted = "" if self.reached == self.planted else f", REACHED {self.reached}/{self.planted}"
        return f"{self.defect:24}  {', '.join(cells)}{stopped}{planted}"

    def as_dict(self) -> dict[str, Any]:
        """The row for JSON, each rate with its Clopper-Pearson interval."""
        alpha = (1.0 - _CONFIDENCE) / 2
        return {
            "defect": self.defect,
            "breaks": defects.named(self.defect).breaks,
            "must_be_seen_by": list(self.seen_by),
            "planted": self.planted,
            "reached": self.reached,
            "stopped": self.stopped,
            "noticed": {
                name: {
                    "times": times,
                    "rate_at_least": clopper_pearson.lower(times, self.planted, alpha),
                    "rate_at_most": clopper_pearson.upper(times, self.planted, alpha),
                }
                for name, times in self.noticed.items()
            },
        }


def matrix(names: Sequence[str], repeat: int, say: Callable[[str], None]) -> Iterator[Row]:
    """Plant each defect, and run every quick audit and those that must notice it.

    Args:
        names: the defects; all of them if there are none.
        repeat: how often each is planted that is noticed with a probability only.
        say: told what is happening.

    Raises:
        PrivflError: If there is no defect of a name.
    """
    chosen = [defects.named(name) for name in names] or defects.DEFECTS
    for defect in chosen:
        say(f"{defect.name}: {defect.breaks}")
        row = Row(defect.name, defect.seen_by)
        for _ in range(repeat if defect.chance else 1):
            _once(defect, row)
        yield row


def _once(defect: Defect, row: Row) -> None:
    row.planted += 1
    with tempfile.TemporaryDirectory(prefix="privfl-sabotage-") as folder:
        try:
            results = audited(Path(folder), [defect])
        except PrivflError:
            row.stopped += 1
        else:
            for audit in AUDITS:
                refuted = any(r.verdict is Verdict.REFUTED for r in results.get(audit.name, ()))
                if audit.name in results:
                    row.noticed[audit.name] = row.noticed.get(audit.name, 0) + refuted
        row.reached += reached(defect, Path(folder))


def audited(folder: Path, planted: Sequence[Defect]) -> dict[str, list[AuditResult]]:
    """What the quick audits, and those that must notice them, find with these defects, by audit.

    Args:
        folder: an empty folder, in which the run leaves its files, and the patches their proof.
        planted: defects of one mode.

    Raises:
        PrivflError: If privfl itself refuses to go on.
    """
    (mode,) = {defect.mode for defect in planted}
    names = ",".join(defect.name for defect in planted)
    seen_by = {name for defect in planted for name in defect.seen_by}
    through = ("privacy_audits.sabotaged", names, "--")
    shop = Workshop(folder, quick=True, through=through, modes=(mode,))
    os.environ[REACHED] = str(folder)
    try:
        shop.run(mode)
        return {
            audit.name: list(audit.run(shop))
            for audit in AUDITS
            if audit.quick or audit.name in seen_by
        }
    finally:
        del os.environ[REACHED]
