"""How every help text ends: an example that can be pasted, and what comes next."""

from __future__ import annotations


def example(command: str, then: str) -> str:
    """The end of a command's help.

    Args:
        command: an example, as typed.
        then: what to do after it, in one phrase.
    """
    return f"\b\nExample:  {command}\nNext:     {then}"
