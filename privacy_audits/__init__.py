"""Empirical audits: attacks on what privfl claims.

Installed with privfl, which never imports this package. It uses the library from outside, as an
attacker or a sceptical reviewer would; ``privfl audit`` runs it. Statistics (:mod:`.bounds`) know
nothing of attacks, attacks (:mod:`.audits`) nothing of how their target was run (:mod:`.targets`),
and a verdict is derived from numbers and never set (:mod:`.result`).

Nothing is imported before it is used: every process of an audited run imports this package.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from privacy_audits.audits.loop import Canaries, audit

__all__ = ["Canaries", "audit"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'privacy_audits' has no attribute {name!r}")
    from privacy_audits.audits import loop

    return getattr(loop, name)


def __dir__() -> list[str]:
    return __all__
