"""All failures of privfl, as one tree.

Every part of privfl may import this module, and it imports nothing of privfl. Users find the
classes as ``privfl.BudgetError`` and so on.

::

    PrivflError                  one sentence for the person at the keyboard (exit code 2)
    ├── BudgetError              a charge that the budget does not admit
    ├── DamagedError             a ledger whose rows are not what was written
    └── InternalError            a state that correct code cannot reach (exit code 1)
        └── ProtocolError        a message that the protocol does not allow at this point
            └── MismatchError    a decrypted sum that is not the sum of what the sites sent

    OutsideGuarantee             a warning: records are used in a way that no epsilon covers
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar, cast

EXIT_USER: Final = 2
EXIT_OURS: Final = 1


class PrivflError(Exception):
    """One sentence for the person at the keyboard: what is wrong, where (file, key), what to do.

    Attributes:
        exit_code: what every process of a job ends with: 2 where the user can mend the cause, 1
            where the fault is in privfl.
    """

    __module__ = "privfl"
    exit_code: int = EXIT_USER


class BudgetError(PrivflError):
    """A charge that the budget does not admit.

    Nothing was written to the ledger, and nothing was released.
    """

    __module__ = "privfl"


class DamagedError(PrivflError):
    """A ledger whose rows are not what was written: altered, cut off, or of another format."""

    __module__ = "privfl"


class InternalError(PrivflError):
    """A state that correct code cannot reach; a job ends with exit code 1."""

    __module__ = "privfl"
    exit_code: int = EXIT_OURS


class ProtocolError(InternalError):
    """A message that the protocol does not allow at this point; nothing of it is used."""

    __module__ = "privfl"


class MismatchError(ProtocolError):
    """A decrypted sum that is not the sum of what the sites sent.

    The one error for every such sum: which check failed would help an attacker, so it is not said.
    """

    __module__ = "privfl"

    def __init__(self) -> None:
        super().__init__(
            "a decrypted sum is not the sum of what the sites sent: it was altered, replayed or "
            "mixed up on the way; nothing of it is used, and the keys of this run are given up"
        )

    def __reduce__(self) -> tuple[type[MismatchError], tuple[()]]:
        return type(self), ()


class OutsideGuarantee(UserWarning):
    """A warning by which data() says that it uses records in a way that no epsilon covers.

    The text goes to the coordinator and into every report, in the clear: it must say nothing about
    records.

    Example:
        >>> import privfl, warnings
        >>> warnings.warn("scaled by all records", privfl.OutsideGuarantee)
    """

    __module__ = "privfl"


_LONGEST = 600


def in_one_line(text: object) -> str:
    """``text`` as one line that every stream and message can carry.

    White space is folded, what is not UTF-8 is escaped, and a very long text is cut.
    """
    line = " ".join(str(text).split()).encode("utf-8", "backslashreplace").decode()
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."


def shown(value: object) -> str:
    """A wrong argument, for a sentence that other sites may read: a number, a flag or the begin of
    a text, and of anything else, which may hold records, only its type.
    """
    if value is None or isinstance(value, int | float | str):
        return f"{value!r:.60}"
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def is_number(value: object, kind: type) -> bool:
    """Whether an argument is a number of this kind of the tower of :mod:`numbers`, and no flag."""
    return isinstance(value, kind) and not isinstance(value, bool)


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of a sentence about an unknown name: the nearest of ``known``, or nothing."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


_Method = TypeVar("_Method", bound=Callable[..., Any])


def words_checked(
    tell: Callable[[Any, Sequence[Any], PrivflError], None],
    name: str = "",
    absent: Mapping[str, str] | None = None,
) -> Callable[[_Method], _Method]:
    """A decorator: a call of the method with wrong words is a TypeError of one sentence.

    Args:
        tell: called before that error is raised, with ``self``, the values of all arguments and the
            sentence, which quotes none of them: other ranks would wait for a call that never
            begins.
        name: what the user calls; by default the name of the method.
        absent: words that the same call of another library takes, and why this one does not.
    """

    def decorate(method: _Method) -> _Method:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            problem = _call_problem(name or method.__name__, method, args, kwargs, absent or {})
            if problem:
                tell(self, [*args, *kwargs.values()], PrivflError(problem))
                raise TypeError(problem)
            return method(self, *args, **kwargs)

        return cast(_Method, call)

    return decorate


def _call_problem(
    name: str,
    method: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    absent: Mapping[str, str],
) -> str:
    """What is wrong with the words of a call, or nothing."""
    import inspect

    parameters = list(inspect.signature(method).parameters.values())[1:]
    known = [p.name for p in parameters]
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    for word in kwargs:
        if word in absent:
            return f"{name} takes no {word}: {absent[word]}"
        if word not in known:
            return f"{name} takes no {word}{did_you_mean(word, known)}"
        if word in positional[: len(args)]:
            return f"{name} was given {word} twice"
    if len(args) > len(positional):
        return f"{name} takes {known[len(positional)]} and all that follows by name only"
    missing = [
        p.name for p in parameters[len(args) :] if p.default is p.empty and p.name not in kwargs
    ]
    return f"{name} needs {', '.join(missing)}" if missing else ""
