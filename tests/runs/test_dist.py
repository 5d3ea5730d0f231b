"""What `make dist` builds works alone: the wheel in a fresh environment, away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.conftest import MPIEXEC, ROOT, Job

PARTS = ("privfl", "privacy_audits", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel made from the source distribution, as `make dist` does it.

    From a copy, because an older build that lies in the checkout would lend what is missing.
    """
    source = tmp_path_factory.mktemp("source")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(
                ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / part, source / part)
    command = [sys.executable, "-m", "build", "--no-isolation", str(source)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=source, env=_outside(), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (source / "dist").glob("*.whl")
    assert len(list((source / "dist").glob("*.tar.gz"))) == 1
    return built


def _outside() -> dict[str, str]:
    """This environment's variables without what would lead Python to the checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment in which the wheel alone is installed; its folder of scripts.

    What the wheel depends on is lent by the environment of the tests: a .pth file names its
    site-packages. Python does not read the .pth files there, so that a privfl which is installed
    from a checkout (`pip install -e`) is not found through it. An MPI library that was installed
    with pip lies in lib/, where mpi4py looks for it, and is lent by links.
    """
    root = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root)], check=True)
    python = root / "bin" / "python"
    paths = {"base": str(root), "platbase": str(root)}
    packages = Path(sysconfig.get_path("purelib", vars=paths))
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for library in (Path(sys.prefix) / "lib").iterdir():
        if not (root / "lib" / library.name).exists():
            (root / "lib" / library.name).symlink_to(library)
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
    command += ["--no-index", "--ignore-installed", "--no-compile", "--quiet", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, env=_outside(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "bin"


def _run(folder: Path, *command: str | Path) -> Job:
    """A command in ``folder``; MPI's own programs are found on the PATH."""
    environment = _outside()
    environment["PATH"] = f"{Path(MPIEXEC).parent}{os.pathsep}{environment.get('PATH', '')}"
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=150,
        check=False,
    )
    return Job(done.returncode, done.stdout, done.stderr)


def test_the_wheel_holds_every_file_of_both_packages_and_nothing_else(wheel: Path):
    files = {
        path.relative_to(ROOT).as_posix()
        for package in ("privfl", "privacy_audits")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == files


def test_the_wheel_alone_runs_from_an_empty_folder(fresh: Path, tmp_path: Path):
    where = _run(tmp_path, fresh / "python", "-c", "import privfl; print(privfl.__file__)")
    assert Path(where.out.strip()).is_relative_to(fresh.parent), where
    doctor = _run(tmp_path, fresh / "privfl", "doctor")
    assert (doctor.code, doctor.out.splitlines()[-1:]) == (0, ["all well"]), doctor
    audits = _run(tmp_path, fresh / "privfl", "audit", "list")
    assert (audits.code, audits.err) == (0, "")
    init = _run(tmp_path, fresh / "privfl", "init", "mine")
    assert init.code == 0, init.err
    assert (tmp_path / "mine" / "experiment.yaml").exists()
    settings = ("--set", "rounds=2", "--set", "sites=[north, east]")
    demo = _run(tmp_path, MPIEXEC, "-n", "3", fresh / "privfl", "train", *settings)
    assert demo.code == 0, demo.err
    assert demo.folder.parent == tmp_path / "runs"
    assert {"report.html", "model.safetensors"} <= {path.name for path in demo.folder.iterdir()}
