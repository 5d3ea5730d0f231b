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
    """Check, without running user code, that every ``file.py:function`` names a function there.

    Args:
        experiment: the experiment with the references.
        folder: the folder that relative paths of files count from.

    Raises:
        PrivflError: If a file cannot be read or is not Python, or if it defines no such name.
    """
    references = {key: getattr(experiment, key) for key in ("model", "data", "loss")}
    for name, reference in experiment.evaluation.metrics.items():
        references[f"evaluation.metrics.{name}"] = reference
    for key, reference in references.items():
        source, name = reference.rsplit(":", 1)
        if not source.endswith(".py"):
            continue
        path = _file(folder, source)
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
    """Import the function behind a reference. Runs user code.

    Args:
        key: the key of the experiment that holds the reference, for error messages.
        reference: ``file.py:function`` or ``package.module:function``.
        folder: the folder that a relative path of a file counts from.

    Raises:
        PrivflError: If the module cannot be imported, or if it has no such function.
    """
    source, name = reference.rsplit(":", 1)
    try:
        module = _import(source, folder)
    except Exception as error:  # whatever the user's module raises
        # The message stays here: code that runs on import may have read records.
        traceback.print_exc()
        raise PrivflError(f"{key}: importing {source} raised {type(error).__name__}") from error
    function = getattr(module, name, None)
    if not callable(function):
        hint = did_you_mean(name, dir(module))
        raise PrivflError(f"{key}: {source} has no function '{name}'{hint}")
    return function  # type: ignore[no-any-return]


def _file(folder: Path, source: str) -> Path:
    return (folder / os.path.expanduser(source)).resolve()


def _import(source: str, folder: Path) -> Any:
    if source.endswith(".py"):
        return _module_from_file(_file(folder, source))
    return importlib.import_module(source)


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
        elif isinstance(node, ast.Assign) and _assigns_names(node):
            names.extend(target.id for target in node.targets if isinstance(target, ast.Name))
        elif not isinstance(node, ast.Expr | ast.Assert | ast.Raise):
            names.append("*")
    return names


def _assigns_names(node: ast.Assign) -> bool:
    return all(isinstance(target, ast.Name) for target in node.targets)
