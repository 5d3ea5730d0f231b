"""Whose records a cost concerns.

Training and evaluation records are different ones, so each kind has an account of its own.
"""

from __future__ import annotations

from typing import Final, Literal

Account = Literal["training", "evaluation"]
ACCOUNTS: Final[tuple[Account, ...]] = ("training", "evaluation")


def account_of(name: str) -> Account:
    """The account of this name.

    Raises:
        ValueError: there is none.
    """
    for account in ACCOUNTS:
        if name == account:
            return account
    raise ValueError(f"no account {name}")
