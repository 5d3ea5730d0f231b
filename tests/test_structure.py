"""The house: imports point one way, heavy packages stay where they belong, the command line stays light."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "privfl"
# Which rooms a room may look into (itself and `errors` always; docs: CONTRIBUTING.md).
ARROWS = {
    "cli": {
        "accounting", "admission", "config", "coordinator", "federation", "identity", "ledger", "reporting", "secagg", "site",
        "trainer", "transport",
    },
    "engine": {"accounting", "admission", "dp", "ledger", "noise", "secagg", "secure_sum", "site"},
    "secure_sum": {"federation", "secagg", "site", "transport"},
    "coordinator": {"federation", "secagg", "site", "transport"},
    "site": {
        "accounting", "admission", "config", "federation", "identity", "ledger", "noise", "secagg", "trainer", "transport",
    },
    "trainer": {"config", "dp", "noise"},
    "dp": {"accounting", "noise"},
    "admission": {"accounting", "config", "ledger", "noise"},
    "reporting": {"accounting", "config", "identity", "ledger"},
    "ledger": {"accounting"},
    "noise": {"config", "federation"},
    "secagg": {"federation", "identity", "site"},
    "config": set(),
    "accounting": set(),
    "federation": set(),
    "transport": set(),
    "demo": set(),
    "identity": set(),
}  # fmt: skip
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


def _imports(path: Path) -> list[tuple[str, int]]:
    """(module, line) of every import in a file, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            found += [
                (f"{node.module}.{alias.name}" if node.module == "privfl" else str(node.module), node.lineno)
                for alias in node.names
            ]
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_one_way(path: Path):
    place = str(path.relative_to(PACKAGE))
    room = place.removesuffix(".py").split("/")[0]
    for module, line in _imports(path):
        package, _, rest = module.partition(".")
        if package == "privfl" and room != "__init__" and room != "errors":
            target = rest.split(".")[0]
            if target not in ("errors", "__version__", room):
                assert target in ARROWS[room], f"{place}:{line}: {room} may not import privfl.{target}"
        if package == "privfl" and room == "errors":
            pytest.fail("errors.py imports from privfl")
        if package in HOMES:
            assert place.startswith(HOMES[package]), f"{place}:{line}: {package} belongs to {', '.join(HOMES[package])}"


def test_every_room_has_its_arrows():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    rooms -= {"__pycache__", "__init__", "errors"}
    assert rooms == set(ARROWS)


@pytest.mark.parametrize("code", ["import privfl", "import sys; from privfl.cli import main; sys.argv = ['privfl', '--help']"])
def test_the_entrance_is_light(code: str):
    heavy = ["torch", "mpi4py", "tenseal", "dp_accounting", "pydantic", "numpy", "yaml", "opacus", "scipy"]
    heavy += ["matplotlib", "jinja2", "rich"]
    script = f"""
import atexit, json, os, sys
report = lambda: os.write(2, json.dumps([m for m in {heavy!r} if m in sys.modules]).encode())
atexit.register(report)
{code}
if 'main' in globals(): main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stderr) == []


def test_the_agent_has_no_torch():
    script = "import sys; import privfl.site.agent, privfl.coordinator.driver, privfl.cli.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_files_stay_short():
    long = {str(p.relative_to(PACKAGE.parent)): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 450}
    assert long == {}
