"""Plants a defect in a process, and leaves proof that it was reached."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from privfl.errors import PrivflError

# The folder in which a process notes which patches it reached.
REACHED = "PRIVACY_AUDITS_REACHED"
Process = Literal["agent", "trainer"]
# From the original to what stands in its place.
Replace = Callable[[Any], Any]


@dataclass(frozen=True)
class Patch:
    """One replacement in one kind of process.

    Attributes:
        process: where it is planted; the coordinator is an agent's process too.
        target: the dotted name of what is replaced: a function, method or property.
        replace: makes the replacement of the original.
    """

    process: Process
    target: str
    replace: Replace


@dataclass(frozen=True)
class Defect:
    """A fault as somebody could make it.

    Attributes:
        name: what it is called on the command line.
        breaks: the claim that is false with it, in one sentence.
        seen_by: the audits that must notice it.
        mode: the algorithm in which it is tried.
        patches: how it is made.
        chance: whether an audit notices it with a probability only.
    """

    name: str
    breaks: str
    seen_by: tuple[str, ...]
    mode: Literal["fedsgd", "fedavg"]
    patches: tuple[Patch, ...]
    chance: bool = False


def plant(defect: Defect, process: Process) -> None:
    """Put the defect's patches for this kind of process in place.

    Raises:
        PrivflError: If a patch names what does not exist: then the library has changed, and the
            defect must be written anew.
    """
    for number, patch in enumerate(defect.patches):
        if patch.process == process:
            _plant(patch, f"{defect.name}-{number}")


def _plant(patch: Patch, name: str) -> None:
    owner, member = _owner(patch.target)
    original = (
        owner.__dict__.get(member) if isinstance(owner, type) else getattr(owner, member, None)
    )
    if original is None:
        raise PrivflError(f"the defect {name} patches {patch.target}, which does not exist")
    setattr(owner, member, _noting(patch.replace(original), name))


def _owner(target: str) -> tuple[Any, str]:
    """The module or class of a dotted name, or None, and the last part of the name."""
    parts = target.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:-1]:
            owner = getattr(owner, part, None)
        return owner, parts[-1]
    return None, parts[-1]


def _noting(replacement: Any, name: str) -> Any:
    """The replacement, which leaves a file when it is called."""
    if isinstance(replacement, property):
        return property(_noting(replacement.fget, name))
    if isinstance(replacement, classmethod):
        return classmethod(_noting(replacement.__func__, name))

    @functools.wraps(replacement)
    def noting(*arguments: Any, **words: Any) -> Any:
        folder = os.environ.get(REACHED)
        if folder:
            (Path(folder) / name).touch()
        return replacement(*arguments, **words)

    return noting


def reached(defect: Defect, folder: Path) -> bool:
    """Whether every patch of the defect was called in some process of the run."""
    return all((folder / f"{defect.name}-{n}").exists() for n in range(len(defect.patches)))
