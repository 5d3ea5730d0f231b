"""privfl: differentially private federated learning over MPI, with an epsilon for every site.

Nothing heavy is imported here: torch, MPI, TenSEAL, dp-accounting and pydantic load only where they
are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from privfl._version import __version__

if TYPE_CHECKING:
    from privfl.engine import PrivacyEngine
    from privfl.errors import OutsideGuarantee
    from privfl.secure_sum import SecureSum

__all__ = ["OutsideGuarantee", "PrivacyEngine", "SecureSum", "__version__"]

_HOMES = {
    "OutsideGuarantee": "privfl.errors",
    "PrivacyEngine": "privfl.engine",
    "SecureSum": "privfl.secure_sum",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'privfl' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
