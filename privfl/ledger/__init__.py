"""The durable book of what has been spent on one site's records: SQLite, debited before anything is released."""

from privfl.ledger.heads import Head, head_bytes
from privfl.ledger.ledger import BudgetError, Ledger
from privfl.ledger.rows import DamagedError, Row

__all__ = ["BudgetError", "DamagedError", "Head", "Ledger", "Row", "head_bytes"]
