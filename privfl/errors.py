"""The two kinds of failure. Every part of privfl may import this module, and it imports nothing of privfl."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

EXIT_USER = 2
EXIT_OURS = 1


class PrivflError(Exception):
    """One sentence for the person at the keyboard: what is wrong, where (file, key), what to do.

    ``exit_code`` is what every process of the job ends with: 2 where the user can mend the cause, 1 where it is our fault.
    """

    exit_code = EXIT_USER


class InternalError(PrivflError):
    """A state that correct code cannot reach; the job ends with exit code 1."""

    exit_code = EXIT_OURS


class ProtocolError(InternalError):
    """A message that the protocol does not allow at this point; nothing of it is used."""


def in_one_line(text: object) -> str:
    """``text`` with its white space folded, so that an error stays one line on the screen."""
    return " ".join(str(text).split())


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of a sentence about an unknown name: a suggestion if one of ``known`` is near, otherwise nothing."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""
