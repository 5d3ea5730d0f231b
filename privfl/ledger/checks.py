"""What can be wrong with the rows of a ledger although their chain fits: costs and limits, computed
anew, and a head that was shown to others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from privfl.accounting import ACCOUNTS, Account, RenyiFilter, account_of, divergences
from privfl.ledger.heads import Head
from privfl.ledger.rows import Row, add_steps, mechanism_of, total

# Cached divergences that differ by more than this from new ones were not computed from the event
# beside them.
_TOLERANCE = 1e-9


def cost_problems(
    rows: Sequence[Row], filters: Mapping[Account, RenyiFilter], orders: tuple[float, ...]
) -> list[str]:
    """Every cost and every limit that does not hold, each in a sentence.

    Args:
        rows: all rows of a ledger, whose chain was checked.
        filters: its limits, by account.
        orders: the Renyi orders of all its vectors.
    """
    problems = []
    vectors: dict[int, NDArray[np.float64]] = {}
    steps: dict[str, dict[int, int]] = {account: {} for account in ACCOUNTS}
    spent = {account: limit.nothing() for account, limit in filters.items()}
    for row in rows:
        if row.kind == "mechanism":
            event, vectors[row.number] = mechanism_of(row)
            if not np.allclose(
                vectors[row.number], divergences(event, orders), rtol=_TOLERANCE, atol=0.0
            ):
                problems.append(
                    f"the cached divergences of row {row.number} are not those of its event"
                )
        elif row.kind in ("charge", "refund"):
            add_steps(steps[row.account], row)
            account = account_of(row.account)
            if account in spent and row.kind == "refund":
                spent[account] = total(steps[account], vectors, len(orders))
            elif account in spent and row.steps:
                spent[account] = spent[account] + row.steps * vectors[row.mechanism]
                if not filters[account].admits(spent[account] / (1.0 + _TOLERANCE)):
                    problems.append(f"the charge in row {row.number} is beyond the budget")
    return problems


def head_problem(rows: Sequence[Row], head: Head) -> str | None:
    """Why these rows cannot be those of a ledger that once had this head; None if they can."""
    if head.rows > len(rows):
        missing = (
            f"row {head.rows} is"
            if head.rows == len(rows) + 1
            else f"rows {len(rows) + 1} to {head.rows} are"
        )
        return f"{missing} missing at the end, although its head was shown"
    if head.rows < 1 or rows[head.rows - 1].hash != head.hash:
        return (
            f"row {head.rows} is not the one whose head was shown: rows were taken back and "
            "written anew"
        )
    return None
