"""All failures of privfl, as one tree.

Every part of privfl may import this module, and it imports nothing of privfl.

::

    PrivflError              one sentence for the person at the keyboard, who can mend the cause
    (exit code 2) ├── BudgetError          a charge that the budget does not admit ├── DamagedError
    a ledger whose rows are not what was written └── InternalError        a state that correct code
    cannot reach (exit code 1)
        └── ProtocolError    a message that the protocol does not allow at this point
            └── MismatchError    a decrypted sum that is not the sum of what the sites sent

    OutsideGuarantee         a warning of user code: records are used in a way that no epsilon
        covers
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Final

EXIT_USER: Final = 2
EXIT_OURS: Final = 1


class PrivflError(Exception):
    """One sentence for the person at the keyboard: what is wrong, where (file, key), what to do.

    ``exit_code`` is what every process of the job ends with: 2 where the user can mend the cause, 1
    where it is our fault.
    """

    exit_code: int = EXIT_USER


class BudgetError(PrivflError):
    """A charge that the budget does not admit; nothing was written to the ledger and nothing was
    released.
    """


class DamagedError(PrivflError):
    """A ledger whose rows are not what was written: altered, cut off, or no ledger of privfl at
    all.
    """


class InternalError(PrivflError):
    """A state that correct code cannot reach; the job ends with exit code 1."""

    exit_code: int = EXIT_OURS


class ProtocolError(InternalError):
    """A message that the protocol does not allow at this point; nothing of it is used."""


class MismatchError(ProtocolError):
    """The one error for every sum that is not what the members sent; which check failed would
    help an attacker, so it is not said.
    """

    def __init__(self) -> None:
        super().__init__(
            "a decrypted sum is not the sum of what the sites sent: it was altered, replayed or "
            "mixed up on the way; "
            "nothing of it is used, and the keys of this run are given up"
        )


class OutsideGuarantee(UserWarning):
    """What a data() function warns with when it uses records in a way that no epsilon covers:
    `warnings.warn("...", privfl.OutsideGuarantee)`.

    The text goes to the coordinator and into every report, in the clear: it must say nothing about
    records.
    """


_LONGEST = 600


def in_one_line(text: object) -> str:
    """``text`` as one line that every stream and message can carry: white space folded, odd
    bytes escaped, cut if very long.
    """
    line = " ".join(str(text).split()).encode("utf-8", "backslashreplace").decode()
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of a sentence about an unknown name: a suggestion if one of ``known`` is near,
    otherwise nothing.
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""
