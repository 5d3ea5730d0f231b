"""The durable record of what has been spent on one site's records: SQLite, debited before
anything is released.
"""

from privfl.ledger.heads import Head, head_bytes
from privfl.ledger.ledger import Ledger
from privfl.ledger.rows import Row
from privfl.ledger.run_facts import RunFacts

__all__ = ["Head", "Ledger", "Row", "RunFacts", "head_bytes"]
