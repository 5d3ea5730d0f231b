"""From files to validated objects. Every error is one sentence with file and key."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from privfl.config.experiment import Experiment
from privfl.config.site import SiteFile
from privfl.errors import PrivflError, did_you_mean, in_one_line

_Section = TypeVar("_Section", bound=BaseModel)

# Aliases may repeat this many values. A few nested ones stand for more than memory can hold.
_MOST_REPEATED: Final = 100_000


class _Loader(yaml.SafeLoader):
    """YAML whose plain values are those of version 1.2 (its core schema), and without what PyYAML
    lets pass and later stages cannot take.

    PyYAML reads version 1.1, in which 010 is eight, 1:30 is ninety, 2026-11-28 is a date, no is
    false, and 1e5 is a text. Later stages cannot take a key given twice, of which PyYAML silently
    keeps the last, aliases that stand for very many values, and texts that cannot be written as
    UTF-8.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        # By node, the number of values in it when its aliases are written out.
        self._sizes: dict[int, int] = {}
        self._repeated = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if node is None:
            return None
        if not is_alias:
            self._sizes[id(node)] = 1 + sum(self._sizes[id(child)] for child in _children(node))
            return node
        if id(node) not in self._sizes:
            raise _error("an alias stands inside of what it repeats; write it out", node)
        self._repeated += self._sizes[id(node)]
        if self._repeated > _MOST_REPEATED:
            raise _error(f"aliases repeat more than {_MOST_REPEATED} values; write them out", node)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # which PyYAML itself refuses
            if key in keys:
                raise _error(f"key '{key}' stands twice in one mapping", node)
            keys.add(key)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and not _is_utf8(value):
            raise _error(
                "a text has half of a character, a lone surrogate; write the whole one", node
            )
        return value


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text if base == 10 else text[2:], base)


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(
        loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan")
    )


_Loader.yaml_implicit_resolvers = {}
for _kind, _pattern, _first in (
    ("null", r"(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        "float",
        r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)"
        r"|\.(nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that :class:`_Loader` would take for anything else."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _error(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, problem, node.start_mark)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def demo_path() -> Path:
    """The experiment file of the built-in demo."""
    return Path(str(resources.files("privfl") / "demo" / "experiment.yaml"))


def load_experiment(path: Path, settings: Sequence[str] = ()) -> Experiment:
    """Read an experiment file.

    Args:
        path: the experiment file.
        settings: ``key.path=value``, each of which overrides a value of the file.

    Raises:
        PrivflError: If the file cannot be read or is not YAML, or if a key or value is not valid.
    """
    values = _read(path, "the experiment file")
    for setting in settings:
        _apply(values, setting)
    return _validate(Experiment, values, f"{path} with --set" if settings else str(path))


def to_yaml(experiment: Experiment) -> str:
    """The experiment as a file that :func:`load_experiment` reads back."""
    return yaml.dump(experiment.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def sites_folder(experiment: Path | None, folder: Path | None, without: bool) -> Path | None:
    """The folder with site files: the one that was named, or else ``sites`` beside the experiment
    if it has any.

    Args:
        experiment: the experiment file; None for the built-in demo.
        folder: what ``--sites`` says.
        without: whether ``--no-sites`` says that there are none.

    Raises:
        PrivflError: If both are said.
    """
    if folder is not None and without:
        raise PrivflError("--sites and --no-sites contradict each other; leave one out")
    if folder is not None or without or experiment is None:
        return folder
    beside = experiment.parent / "sites"
    return beside if any(beside.glob("*.yaml")) else None


def load_site(folder: Path | None, site: str) -> SiteFile:
    """Read the file of a site; relative paths in it become absolute.

    Args:
        folder: the folder of the site files; None gives the defaults.
        site: the name of the site.

    Raises:
        PrivflError: If the file cannot be read or is not YAML, or if a key or value is not valid.
    """
    if folder is None:
        return SiteFile()
    path = folder / f"{site}.yaml"
    file = _validate(SiteFile, _read(path, f"the file of site {site}"), str(path))
    absolute: dict[str, Any] = {
        name: str((folder / value).resolve())
        for name in ("output", "log", "identity")
        if (value := getattr(file, name)) is not None
    }
    if file.ledger is not None:
        ledger = str((folder / file.ledger.file).resolve())
        absolute["ledger"] = file.ledger.model_copy(update={"file": ledger})
    return file.model_copy(update=absolute)


def _read(path: Path, what: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PrivflError(f"cannot read {what} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PrivflError(f"{path} is not a text file in UTF-8") from error
    return _mapping(text, str(path))


def _parse(text: str) -> Any:
    """What a piece of YAML says.

    Raises:
        ValueError: If it is not YAML. PyYAML itself raises this for a date that does not exist.
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
        kind = type(values).__name__
        raise PrivflError(f"{where} must hold keys and values, it holds a {kind}")
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
        problems = error.errors()
        # Where several spellings of a value are allowed pydantic reports each; the first says
        # enough. But an unknown key explains a missing one.
        unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
        problem = (unknown or problems)[0]
        raise PrivflError(f"{where}: {_sentence(schema, problem)}") from error


def _sentence(schema: type[BaseModel], problem: Any) -> str:
    # Of a union pydantic also names the type that it tried.
    location = [
        part
        for part in problem["loc"]
        if not (isinstance(part, str) and ("[" in part or part in ("float", "int", "str")))
    ]
    key = ".".join(str(part) for part in location)
    match problem["type"]:
        case "extra_forbidden":
            hint = did_you_mean(str(location[-1]), _keys(schema, location[:-1]))
            return f"unknown key '{key}'{hint}"
        case "missing":
            return f"key '{key}' is missing"
        case "value_error":
            return f"{key} {problem['ctx']['error']}" if key else f"{problem['ctx']['error']}"
    message = problem["msg"].removeprefix("Input should be ").removeprefix("Input should have ")
    return f"{key} must be {message}, got {_short(problem['input'])}"


def _keys(schema: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """The keys that are known in the section at ``location``."""
    for part in location:
        field = schema.model_fields.get(str(part))
        inner = None if field is None else field.annotation
        choices = get_args(inner) if get_origin(inner) in (Union, UnionType) else (inner,)
        types = [get_args(c)[0] if get_origin(c) is Annotated else c for c in choices]
        sections = [c for c in types if isinstance(c, type) and issubclass(c, BaseModel)]
        schema = sections[0] if sections else BaseModel
    return list(schema.model_fields)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
