"""privfl: differentially private federated learning over MPI, with an epsilon for every site.

:class:`PrivacyEngine` protects a training loop of your own, :class:`SecureSum` is the encrypted sum
alone, :mod:`privfl.accounting` says what mechanisms cost, and every failure is a
:class:`PrivflError`. Everything else is what the command `privfl` is made of.

Nothing heavy is imported here: torch, MPI, TenSEAL, dp-accounting and pydantic load only where they
are used.
"""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING, Any

from privfl._version import __version__
from privfl.errors import (
    BudgetError,
    DamagedError,
    InternalError,
    MismatchError,
    OutsideGuarantee,
    PrivflError,
    ProtocolError,
    did_you_mean,
)

__all__ = [
    "BudgetError",
    "DamagedError",
    "InternalError",
    "MismatchError",
    "OutsideGuarantee",
    "PrivacyEngine",
    "PrivflError",
    "ProtocolError",
    "SecureSum",
    "__version__",
    "accounting",
]

# What is imported when it is first asked for, as pkgutil.resolve_name wants it.
_LAZY = {
    "PrivacyEngine": "privfl.engine:PrivacyEngine",
    "SecureSum": "privfl.secure_sum:SecureSum",
    "accounting": "privfl.accounting:",
}

if TYPE_CHECKING:
    from privfl import accounting
    from privfl.engine import PrivacyEngine
    from privfl.secure_sum import SecureSum
else:
    # A type checker that saw this would take every name for one of privfl.
    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(
                f"module 'privfl' has no attribute '{name}'{did_you_mean(name, __all__)}"
            )
        return pkgutil.resolve_name(_LAZY[name])


def __dir__() -> list[str]:
    return __all__
