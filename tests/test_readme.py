"""What the README and the documents tell people to type works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from privfl.cli import _COMMANDS
from privfl.config import load_experiment
from tests.conftest import MPIEXEC, PRIVFL, ROOT, Job, run_job

README = (ROOT / "README.md").read_text()


def blocks(kind: str) -> list[str]:
    """The fenced blocks of one language, without their indentation."""
    return [
        re.sub(rf"^ {{{len(b[0])}}}", "", b[1], flags=re.M)
        for b in re.findall(rf"^( *)```{kind}\n(.*?)^ *```$", README, re.M | re.S)
    ]


def commands() -> list[str]:
    return [
        line[2:].split("   #")[0].strip()
        for block in blocks("console")
        for line in block.splitlines()
        if line.startswith("$ ")
    ]


def test_the_first_screen_has_the_two_commands():
    first = "\n".join(README.splitlines()[:30])
    assert "$ make demo" in first
    assert "$ make test" in first


def test_every_privfl_command_of_the_readme_runs(tmp_path: Path):
    ran = [c for c in commands() if "privfl" in c]
    assert len(ran) >= 2
    folder = None
    for text in ["privfl init mine", *ran]:
        words = [{"mpiexec": MPIEXEC, "privfl": PRIVFL}.get(word, word) for word in text.split()]
        words += ["--set", "rounds=1"] if "train" in words else []
        done = subprocess.run(
            words, capture_output=True, text=True, cwd=tmp_path, timeout=150, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stderr}"
        folder = Job(0, done.stdout, "").folder if "train" in words else folder
    (snippet,) = [b for b in blocks("python") if "load_file" in b]
    snippet = re.sub(r'"runs/[^"]*"', repr(str(folder / "model.safetensors")), snippet)
    sys.path.insert(0, str(tmp_path / "mine"))
    try:
        exec(snippet, {})
    finally:
        sys.path.pop(0)


def test_the_sum_alone_runs_as_shown(tmp_path: Path):
    (snippet,) = [b for b in blocks("python") if "SecureSum" in b]
    (tmp_path / "program.py").write_text(
        snippet + "assert total.tolist() == [3 * n for n in range(10)]\n"
    )
    job = run_job(3, [sys.executable, str(tmp_path / "program.py")])
    assert job.code == 0, job.err


BEFORE = """
import privfl
import torch
from mpi4py import MPI
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
model = torch.nn.Linear(4, 2)
records = TensorDataset(torch.randn(40, 4), torch.zeros(40, dtype=torch.long))
loader = DataLoader(records, batch_size=10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
"""
AFTER = """
for x, y in loader:
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
weights = next(model.parameters()).flatten().tolist()
assert MPI.COMM_WORLD.allgather(weights) == [weights] * 3
assert 0 < engine.get_epsilon(1e-5) < 10
"""


def test_the_engine_runs_as_shown(tmp_path: Path):
    (snippet,) = [b for b in blocks("python") if "PrivacyEngine" in b]
    # Every rank is a site with a ledger of its own.
    snippet = snippet.replace('"zurich"', 'f"site{MPI.COMM_WORLD.rank}"').replace(
        '"zurich.', 'f"{MPI.COMM_WORLD.rank}.'
    )
    (tmp_path / "program.py").write_text(BEFORE + snippet + AFTER)
    job = run_job(3, [sys.executable, str(tmp_path / "program.py")], cwd=tmp_path)
    assert job.code == 0, job.err
    assert len(list(tmp_path.glob("*.ledger"))) == 3


def test_an_experiment_becomes_secure_dp_sgd_by_the_keys_shown(tmp_path: Path):
    (shown,) = [yaml.safe_load(b) for b in blocks("yaml") if "fedsgd" in b]
    values = (
        yaml.safe_load((ROOT / "privfl" / "demo" / "experiment.yaml").read_text())
        | shown
        | {"local_steps": 1}
    )
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(values))
    experiment = load_experiment(tmp_path / "experiment.yaml")
    assert (experiment.algorithm, experiment.privacy.noise, experiment.collusion) == (
        "fedsgd",
        "distributed",
        1,
    )


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README):
        if target != "sure":
            assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize(
    "page",
    sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")]),
    ids=lambda p: p.name,
)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_documented_commands_exist():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for command in re.findall(r"`privfl ([a-z]+)", page.read_text()):
            assert command in _COMMANDS, f"{page.name}: privfl {command}"
