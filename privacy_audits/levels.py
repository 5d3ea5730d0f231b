"""How rarely a run of all audits may raise a false alarm, written down once.

All audits together make :data:`TESTS` tests in which chance plays a part. Each may refute a true
claim with probability at most :data:`LEVEL`, so all of them together with probability at most
:data:`TOTAL` (Bonferroni), whether they depend on each other or not. A run of some audits makes
fewer tests, and has fewer false alarms.
"""

from __future__ import annotations

from collections.abc import Iterable

TOTAL = 0.01
# An upper bound, so that a new test does not move the levels of all others. tests/privacy_audits
# counts.
TESTS = 50
LEVEL = TOTAL / TESTS
# An audit of somebody's own model makes two tests and no others.
OWN_LEVEL = TOTAL / 2


def any_of(p_values: Iterable[float]) -> float:
    """One p-value for several tests of one claim: the least, times their number (Bonferroni)."""
    values = list(p_values)
    return min(1.0, len(values) * min(values))
