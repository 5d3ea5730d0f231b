"""The house: imports point one way, heavy packages stay where they belong, no process reaches
what it must not touch.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "privfl"
# Which rooms a room may look into (itself, `errors` and `_version` always; docs: CONTRIBUTING.md).
# A file at the top is a room.
ARROWS = {
    "cli": {
        "accounting",
        "admission",
        "config",
        "coordinator",
        "environment",
        "identity",
        "ledger",
        "reporting",
        "secagg",
        "site",
        "transport",
    },
    "engine": {"environment", "_engine_backends", "_rank_group", "dp", "noise"},
    "_engine_backends": {
        "_group_sum",
        "_rank_group",
        "accounting",
        "admission",
        "dp",
        "ledger",
        "noise",
        "secagg",
    },
    "secure_sum": {"_group_sum", "_rank_group", "secagg"},
    "_group_sum": {"_rank_group", "federation", "secagg", "secagg.session", "site", "transport"},
    "_rank_group": {
        "environment",
        "federation",
        "identity",
        "secagg",
        "secagg.session",
        "transport",
    },
    "coordinator": {
        "accounting",
        "admission",
        "config",
        "environment",
        "federation",
        "reporting",
        "secagg",
        "secagg.session",
        "transport",
    },
    "site": {
        "accounting",
        "admission",
        "config",
        "environment",
        "federation",
        "identity",
        "ledger",
        "noise",
        "secagg",
        "secagg.session",
        "trainer",
        "transport",
    },
    "trainer": {"config", "dp", "noise"},
    "dp": {"accounting", "noise"},
    "admission": {"accounting", "config", "ledger", "noise", "secagg"},
    "reporting": {"accounting", "admission", "config", "federation", "identity", "ledger"},
    "ledger": {"accounting"},
    "secagg.session": {"identity", "secagg"},
    "secagg": set(),
    "accounting": set(),
    "config": set(),
    "demo": set(),
    "environment": set(),
    "federation": set(),
    "identity": set(),
    "noise": set(),
    "transport": set(),
}
# Heavy packages, and the only places that may import them (at any depth of a function).
HOMES = {
    "torch": ("dp/", "demo/", "trainer/main.py"),
    "opacus": ("dp/",),
    "safetensors": ("trainer/main.py",),
    "mpi4py": ("transport/mpi.py",),
    "tenseal": ("secagg/",),
    "dp_accounting": ("accounting/",),
    "matplotlib": ("reporting/plots.py",),
    "jinja2": ("reporting/html.py",),
}
# What the code of a process must never reach, however many imports away, and whichever function
# they stand in.
NEVERS = {
    "privfl.site.agent": ("torch", "opacus", "privfl.dp", "privfl.trainer.main"),
    "privfl.coordinator.run": ("torch", "opacus", "privfl.dp", "privfl.trainer", "privfl.site"),
    "privfl.trainer.main": (
        "mpi4py",
        "tenseal",
        "privfl.secagg",
        "privfl.ledger",
        "privfl.transport",
        "privfl.identity",
        "privfl.federation",
    ),
    "privfl.secagg.session.handshake": ("torch", "mpi4py", "privfl.federation", "privfl.transport"),
}
# What holds a secret key or uses one. Of these the coordinator's room imports nothing by name.
KEYS = {
    "SumKey",
    "Decryption",
    "RunKeys",
    "SumSession",
    "SumAttempt",
    "Handshake",
    "encrypt",
    "open_keys",
    "Identity",
}


def _room(module: str) -> str:
    """The room of a dotted name of privfl."""
    parts = module.split(".")[1:]
    if parts[:2] == ["secagg", "session"]:
        return "secagg.session"
    return (
        parts[0]
        if parts and ((PACKAGE / parts[0]).is_dir() or (PACKAGE / f"{parts[0]}.py").exists())
        else ""
    )


def _name(path: Path) -> str:
    parts = [PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def _imports(path: Path) -> tuple[tuple[str, int], ...]:
    """(name with its module, line) of every import in a file, also inside functions."""
    names: list[tuple[str, int]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return tuple(names)


FILES = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def _typing_only(path: Path) -> frozenset[int]:
    """Lines of imports that only a type checker makes."""
    blocks = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    ]
    return frozenset(
        line for block in blocks for line in range(block.lineno, (block.end_lineno or 0) + 1)
    )


def _reached(start: str) -> dict[str, str]:
    """Every module that ``start`` reaches, with the chain of imports that leads there."""
    chains, waiting = {start: start}, [start]
    while waiting:
        module = waiting.pop()
        path = FILES.get(module)
        if path is None:
            continue
        for name, line in _imports(path):
            if line in _typing_only(path):
                continue
            target = name
            if name.startswith("privfl"):
                target = name if name in FILES else name.rsplit(".", 1)[0]
            # Importing a module runs the packages around it as well.
            for step in (
                target,
                *(".".join(target.split(".")[:n]) for n in range(2, target.count(".") + 1)),
            ):
                if step not in chains:
                    chains[step] = f"{chains[module]} -> {step}"
                    waiting.append(step)
    return chains


@pytest.mark.parametrize("module", FILES)
def test_arrows_point_one_way(module: str):
    room, path = _room(module), FILES[module]
    place = str(path.relative_to(PACKAGE))
    for name, line in _imports(path):
        package = name.split(".")[0]
        if package == "privfl" and room:
            target = _room(name)
            assert room not in ("errors", "_version"), f"{place}:{line}: {room} imports from privfl"
            if target not in (room, "errors", "_version"):
                assert target in ARROWS[room], (
                    f"{place}:{line}: {room} may not import privfl.{target}"
                )
        if package in HOMES:
            assert place.startswith(HOMES[package]), (
                f"{place}:{line}: {package} belongs to {', '.join(HOMES[package])}"
            )


def test_every_room_has_its_arrows_and_there_is_no_circle():
    assert {_room(module) for module in FILES} - {"", "errors", "_version"} == set(ARROWS)
    left = {room: set(targets) for room, targets in ARROWS.items()}
    while left:
        free = {room for room, targets in left.items() if not targets & set(left)}
        assert free, f"the arrows make a circle among {sorted(left)}"
        left = {room: targets for room, targets in left.items() if room not in free}


@pytest.mark.parametrize("start", NEVERS)
def test_a_process_never_reaches_what_it_must_not_touch(start: str):
    chains = _reached(start)
    for never in NEVERS[start]:
        bad = [
            chain
            for module, chain in chains.items()
            if module == never or module.startswith(f"{never}.")
        ]
        assert not bad, f"{start} must never reach {never}: {bad[0]}"


def test_the_coordinator_names_nothing_that_holds_a_key():
    for module, path in FILES.items():
        if _room(module) == "coordinator":
            assert (
                not {name.rsplit(".", 1)[1] for name, _ in _imports(path) if "." in name} & KEYS
            ), module


@pytest.mark.parametrize(
    "code",
    ["import privfl", "import sys; from privfl.cli import main; sys.argv = ['privfl', '--help']"],
)
def test_the_entrance_is_light(code: str):
    heavy = [
        "torch",
        "mpi4py",
        "tenseal",
        "dp_accounting",
        "pydantic",
        "numpy",
        "yaml",
        "opacus",
        "scipy",
    ]
    heavy += ["matplotlib", "jinja2", "rich"]
    script = f"""
import atexit, json, os, sys
report = lambda: os.write(2, json.dumps([m for m in {heavy!r} if m in sys.modules]).encode())
atexit.register(report)
{code}
if 'main' in globals(): main()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stderr) == []


def test_agent_and_coordinator_have_no_torch():
    script = (
        "import sys; import privfl.site.agent, privfl.coordinator.run, privfl.cli.train; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_files_stay_short():
    long = {
        str(p.relative_to(PACKAGE.parent)): n
        for p in PACKAGE.rglob("*.py")
        if (n := len(p.read_text().splitlines())) > 450
    }
    assert long == {}


@pytest.mark.parametrize("folder", ["benchmarks", "privacy_audits", "tests"])
def test_what_others_import_of_privfl_is_there(folder: str):
    """Also in functions that no test calls, as those of benchmarks are."""
    for path in sorted((PACKAGE.parent / folder).rglob("*.py")):
        for name, line in _imports(path):
            module, _, member = name.rpartition(".")
            if not name.startswith("privfl."):
                continue
            there = name in FILES or hasattr(importlib.import_module(module), member)
            assert there, f"{path}:{line} imports {name}, which does not exist"


def test_the_library_never_imports_its_audits():
    for path in FILES.values():
        assert not [name for name, _ in _imports(path) if name.startswith("privacy_audits")], path
