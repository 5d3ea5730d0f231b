"""From files to validated objects. Every error is one sentence with file and key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from privfl.config.experiment import Experiment
from privfl.config.site import SiteFile
from privfl.errors import PrivflError, did_you_mean, in_one_line

_Section = TypeVar("_Section", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key}' stands twice in one mapping", node.start_mark
                )
        return super().construct_mapping(node, deep)


def demo_path() -> Path:
    """The experiment file of the built-in demo."""
    return Path(str(resources.files("privfl") / "demo" / "experiment.yaml"))


def load_experiment(path: Path, settings: Sequence[str] = ()) -> Experiment:
    """The experiment in ``path`` with ``settings`` of the form ``key.path=value`` put over it.

    Raises:
        PrivflError: the file is missing, not YAML, or breaks the schema.
    """
    values = _read(path, "the experiment file")
    for setting in settings:
        _apply(values, setting)
    return _validate(Experiment, values, f"{path} with --set" if settings else str(path))


def load_site(folder: Path | None, site: str) -> SiteFile:
    """The site file of ``site`` in ``folder``; defaults if no folder was given.

    Raises:
        PrivflError: the file is missing, not YAML, or breaks the schema.
    """
    if folder is None:
        return SiteFile()
    path = folder / f"{site}.yaml"
    found = _validate(SiteFile, _read(path, f"the file of site {site}"), str(path))
    near: dict[str, Any] = {
        name: str((folder / value).resolve())
        for name in ("output", "log", "identity")
        if (value := getattr(found, name)) is not None
    }
    if found.ledger is not None:
        near["ledger"] = found.ledger.model_copy(
            update={"file": str((folder / found.ledger.file).resolve())}
        )
    return found.model_copy(update=near)


def _read(path: Path, what: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PrivflError(f"cannot read {what} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PrivflError(f"{path} is not a text file in UTF-8") from error
    return _mapping(text, str(path))


def _parse(text: str) -> Any:
    """What a piece of YAML says; ValueError if it is none (PyYAML itself raises that for a date
    that does not exist).
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader: plain values only)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _mapping(text: str, where: str) -> dict[str, Any]:
    try:
        values = _parse(text)
    except ValueError as error:
        raise PrivflError(f"{where} is not valid YAML: {in_one_line(error)}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise PrivflError(f"{where} must hold keys and values, it holds a {type(values).__name__}")
    return values


def _apply(values: dict[str, Any], setting: str) -> None:
    path, equals, text = setting.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise PrivflError(f"--set {setting}: write it as key.path=value")
    try:
        value = _parse(text)
    except ValueError as error:
        raise PrivflError(f"--set {setting}: the value is not valid YAML") from error
    section = values
    for key in keys[:-1]:
        inner = section.setdefault(key, {})
        if not isinstance(inner, dict):
            raise PrivflError(f"--set {setting}: '{key}' is not a section")
        section = inner
    section[keys[-1]] = value


def _validate(schema: type[_Section], values: Mapping[str, Any], where: str) -> _Section:
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        sentences = [_sentence(schema, problem) for problem in error.errors()]
        # Where several spellings of a value are allowed pydantic reports each; the first says
        # enough. Unknown keys explain missing ones.
        first = next(
            (
                s
                for s, e in zip(sentences, error.errors(), strict=True)
                if e["type"] == "extra_forbidden"
            ),
            sentences[0],
        )
        raise PrivflError(f"{where}: {first}") from error


def _sentence(schema: type[BaseModel], problem: Any) -> str:
    location = [
        part
        for part in problem["loc"]
        if not (isinstance(part, str) and ("[" in part or part in ("float", "int", "str")))
    ]
    key = ".".join(str(part) for part in location)
    match problem["type"]:
        case "extra_forbidden":
            return (
                f"unknown key "
                f"'{key}'{did_you_mean(str(location[-1]), _keys(schema, location[:-1]))}"
            )
        case "missing":
            return f"key '{key}' is missing"
        case "value_error":
            return f"{key} {problem['ctx']['error']}" if key else f"{problem['ctx']['error']}"
    message = problem["msg"].removeprefix("Input should be ").removeprefix("Input should have ")
    return f"{key} must be {message}, got {_short(problem['input'])}"


def _keys(schema: type[BaseModel], location: Sequence[Any]) -> list[str]:
    for part in location:
        field = schema.model_fields.get(str(part))
        inner = None if field is None else field.annotation
        choices = get_args(inner) if get_origin(inner) in (Union, UnionType) else (inner,)
        choices = tuple(get_args(c)[0] if get_origin(c) is Annotated else c for c in choices)
        schema = next(
            (c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)), BaseModel
        )
    return list(schema.model_fields)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
