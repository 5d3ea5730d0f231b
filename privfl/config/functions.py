"""User functions: ``file.py:function`` or ``package.module:function``.

The agent checks references without running anything; only the trainer imports them.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from privfl.config.experiment import Experiment
from privfl.errors import PrivflError, did_you_mean, in_one_line

# The parser of CPython 3.11 fails now and then when two threads use it, as the ranks of an
# in-process world do.
_PARSING = threading.Lock()


def check_functions(experiment: Experiment, folder: Path) -> None:
    """Check, without running any user code, that ``file.py:function`` references lead somewhere.

    Raises:
        PrivflError: no such file, not Python, or no such name in it.
    """
    references = {key: getattr(experiment, key) for key in ("model", "data", "loss")}
    references |= {
        f"evaluation.metrics.{name}": reference
        for name, reference in experiment.evaluation.metrics.items()
    }
    for key, reference in references.items():
        place, name = reference.rsplit(":", 1)
        if not place.endswith(".py"):
            continue
        path = _file(folder, place)
        try:
            with _PARSING:
                tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        except OSError as error:
            raise PrivflError(f"{key}: cannot read {path}: {error.strerror}") from error
        except (SyntaxError, ValueError) as error:
            raise PrivflError(f"{key}: {path} is not valid Python: {in_one_line(error)}") from error
        names = _top_level_names(tree)
        # A star import may bring any name; then only running the file can tell.
        if name not in names and "*" not in names:
            raise PrivflError(f"{key}: {path} defines no '{name}'{did_you_mean(name, names)}")


def load_function(key: str, reference: str, folder: Path) -> Callable[..., Any]:
    """The function behind ``file.py:function`` (relative to ``folder``) or
    ``package.module:function``. Runs user code.

    Raises:
        PrivflError: it cannot be imported, or is not callable.
    """
    place, name = reference.rsplit(":", 1)
    try:
        module = (
            _module_from_file(_file(folder, place))
            if place.endswith(".py")
            else importlib.import_module(place)
        )
    except Exception as error:  # whatever the user's module raises
        # The message stays here: code that runs on import may have read records.
        traceback.print_exc()
        raise PrivflError(f"{key}: importing {place} raised {type(error).__name__}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise PrivflError(
            f"{key}: {place} has no function '{name}'{did_you_mean(name, dir(module))}"
        )
    return function  # type: ignore[no-any-return]


def _file(folder: Path, place: str) -> Path:
    return (folder / os.path.expanduser(place)).resolve()


def _module_from_file(path: Path) -> Any:
    name = f"privfl_user_{path.stem}"
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) == str(path):
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"no loader for {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _top_level_names(tree: ast.Module) -> list[str]:
    """The names a module defines; '*' where only running it can tell."""
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.extend(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign) and all(
            isinstance(target, ast.Name) for target in node.targets
        ):
            names.extend(target.id for target in node.targets if isinstance(target, ast.Name))
        elif not isinstance(node, ast.Expr | ast.Assert | ast.Raise):
            names.append("*")
    return names
