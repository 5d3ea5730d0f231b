"""Shared fixtures: where the real data lie, and how a test starts a job of several ranks or its
in-process twin.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from privfl.site.observer import Observer

ROOT = Path(__file__).resolve().parent.parent
MPIEXEC = str(Path(sysconfig.get_path("scripts")) / "mpiexec")
PRIVFL = str(Path(sysconfig.get_path("scripts")) / "privfl")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs come last: what is quick to find is found first."""
    items.sort(key=lambda item: item.path.is_relative_to(ROOT / "tests" / "runs"))


@pytest.fixture(scope="session")
def heart_disease() -> Path:
    """The folder with UCI's four processed.*.data files: HEART_DISEASE_DIR, or shared/data
    beside the checkout.
    """
    folder = Path(
        os.environ.get("HEART_DISEASE_DIR") or ROOT.parent / "shared" / "data" / "heart-disease"
    )
    if not (folder / "processed.cleveland.data").exists():
        pytest.skip(
            "UCI Heart Disease is not here: set HEART_DISEASE_DIR to the folder with the four "
            "processed.*.data files"
        )
    return folder


@pytest.fixture
def trainers_as_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites of a twin train in threads of the test's process: torch is loaded once, and a test
    can change what a trainer does.
    """
    from privfl.site import agent
    from tests.trainers import ThreadTrainer

    monkeypatch.setattr(agent, "TrainerProcess", ThreadTrainer)
    monkeypatch.setattr(sys, "path", sys.path.copy())


@dataclass(frozen=True)
class Job:
    """What a finished job left: its exit code, both streams, and the run folder if it named one."""

    code: int
    out: str
    err: str

    @property
    def folder(self) -> Path:
        last = self.out.strip().splitlines()[-1]
        assert last.startswith("run folder: "), f"the last line is {last!r}\n{self.err}"
        return Path(last.removeprefix("run folder: "))


def start_job(
    ranks: int,
    command: Sequence[str],
    *,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.Popen[str]:
    """A job under the mpiexec of this environment, started and not waited for."""
    return subprocess.Popen(
        [MPIEXEC, "-n", str(ranks), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | (env or {}),
        cwd=cwd,
    )


def run_job(
    ranks: int,
    command: Sequence[str],
    *,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 150,
) -> Job:
    """Run a job to its end; a hanging one is killed and fails the test."""
    process = start_job(ranks, command, env=env, cwd=cwd)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"the job did not end within {timeout} s\n{out}\n{err}")
    return Job(process.returncode, out, err)


def train(
    ranks: int,
    *arguments: str | Path,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 150,
) -> Job:
    """`mpiexec -n RANKS privfl train ARGUMENTS`."""
    return run_job(
        ranks, [PRIVFL, "train", *map(str, arguments)], env=env, cwd=cwd, timeout=timeout
    )


def run_cli(
    *arguments: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None
) -> Job:
    """`privfl ARGUMENTS` without a launcher."""
    done = subprocess.run(
        [PRIVFL, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | (env or {}),
        cwd=cwd,
        timeout=120,
        check=False,
    )
    return Job(done.returncode, done.stdout, done.stderr)


def call_cli(*arguments: str | Path) -> Job:
    """`privfl ARGUMENTS` in this process, for tests that look at nothing of a process."""
    from privfl.cli import main

    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        main([*map(str, arguments)])
    return Job(int(end.value.code or 0), out.getvalue(), err.getvalue())


def processes() -> dict[int, list[str]]:
    """The command lines of all running processes, by number (Linux)."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                found[int(entry.name)] = (
                    (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                )
    return found


def descendants(ancestor: int) -> dict[int, list[str]]:
    """The command lines of all children of a process and of theirs, by number (Linux)."""
    commands, parents = processes(), {}
    for pid in commands:
        with contextlib.suppress(OSError):
            # The name, in parentheses, may hold anything; state and parent follow the last one.
            parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    family, generation = {}, {ancestor}
    while generation := {pid for pid, parent in parents.items() if parent in generation}:
        family |= {pid: commands[pid] for pid in generation}
    return family


def wait_for(
    condition: Callable[[], Any], process: subprocess.Popen[str], limit: float = 200
) -> Any:
    """What ``condition`` gives once it gives something true.

    The test fails if the job ends or the time is over before.
    """
    deadline = time.monotonic() + limit
    while not (value := condition()):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail("what the test waits for did not come\n" + "\n".join(process.communicate()))
        time.sleep(0.02)
    return value


def trainer_of(job: subprocess.Popen[str], site: str) -> int:
    """The trainer of a site in this job, and not in another that runs on the same machine."""

    def numbers() -> list[int]:
        return [
            pid
            for pid, words in descendants(job.pid).items()
            if site in words and "trainer" in re.split(r"\W", " ".join(words))
        ]

    return wait_for(numbers, job)[0]


class Screen(io.StringIO):
    """What ranks that are threads write.

    A trainer that is a thread writes into the log of its site, as one that is a process does.
    """

    def write(self, text: str) -> int:
        log = getattr(threading.current_thread(), "log", None)
        return super().write(text) if log is None else log.write(text)


@dataclass
class Twin:
    """A federation whose ranks are threads of this process (the trainers are real children)."""

    codes: list[int | BaseException] = field(default_factory=list)
    out: str = ""
    err: str = ""

    @property
    def folder(self) -> Path:
        return Job(0, self.out, self.err).folder


def run_twin(
    experiment: Path | None,
    *settings: str,
    output: Path | None,
    ranks: int,
    wrap: Callable[[object], object] = lambda t: t,
    sites: Path | None = None,
    observer: Observer | None = None,
) -> Twin:
    """The same code as under mpiexec over the in-process transport; ``wrap`` may put something
    around each rank's transport.
    """
    from privfl.cli.train import run
    from privfl.transport import connect

    twin = Twin(codes=[-1] * ranks)
    world = [wrap(transport) for transport in connect(ranks)]

    def rank(number: int) -> None:
        try:
            twin.codes[number] = run(
                world[number],
                experiment,
                sites=sites,
                output=output,
                settings=settings,
                observer=observer,
            )
        except BaseException as error:
            twin.codes[number] = error

    out, err = Screen(), Screen()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        threads = [
            threading.Thread(target=rank, args=(number,), name=f"rank {number}", daemon=True)
            for number in range(ranks)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(150)
    assert not any(thread.is_alive() for thread in threads), (
        f"the twin hangs\n{out.getvalue()}\n{err.getvalue()}"
    )
    twin.out, twin.err = out.getvalue(), err.getvalue()
    return twin


def in_threads(world: Sequence[Any], part: Callable[[Any], Any]) -> list[Any]:
    """What ``part`` gives, or raises, for each rank of an in-process world, all at once."""
    results: list[Any] = [None] * len(world)

    def rank(number: int) -> None:
        try:
            results[number] = part(world[number])
        except BaseException as error:
            results[number] = error

    threads = [
        threading.Thread(target=rank, args=(number,), daemon=True) for number in range(len(world))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


def without_ptrace() -> list[str]:
    """The start of a command whose process may not read others' memory by the rights of root;
    skips where root cannot give them up.
    """
    if os.geteuid():
        return []
    if shutil.which("setpriv") is None:
        pytest.skip(
            "setpriv is not installed (Debian: util-linux), and root may read every process"
        )
    return ["setpriv", "--bounding-set", "-sys_ptrace", "--inh-caps", "-sys_ptrace"]


TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


def model():
    return nn.Linear(5, 2)


def data(site, shift=0.0):
    generator = torch.Generator().manual_seed(len(site))
    x = torch.randn(120, 5, generator=generator) + shift
    y = (x.sum(dim=1) > 0).long()
    return TensorDataset(x[:100], y[:100]), TensorDataset(x[100:], y[100:])


def loss(output, target):
    return nn.functional.cross_entropy(output, target)


def accuracy(output, target):
    return (output.argmax(dim=1) == target).sum(), len(target)
"""

EXPERIMENT = """
sites: [aa, bbb]
rounds: 2
local_steps: 3
sampling_rate: 0.1
model: task.py:model
data: task.py:data
loss: task.py:loss
optimizer: {name: sgd, lr: 0.2}
evaluation: {records: public, metrics: {accuracy: "task.py:accuracy"}}
privacy: {noise_multiplier: 1.5, delta: 1e-5, max_grad_norm: 1.0}
output: runs
"""


def _written(folder: Path, experiment: str) -> Path:
    (folder / "task.py").write_text(TASK)
    path = folder / "experiment.yaml"
    path.write_text(experiment)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A two-site experiment on generated data; the path of its file. A test may edit both files."""
    return _written(tmp_path, EXPERIMENT)


@pytest.fixture
def sites(tmp_path: Path) -> Path:
    """Site files with a budget of epsilon 40 for both sites of the small experiment."""
    folder = tmp_path / "sites"
    folder.mkdir()
    for site in ("aa", "bbb"):
        (folder / f"{site}.yaml").write_text(
            f"ledger: ../{site}.ledger\nbudget: {{epsilon: 40, delta: 1.0e-5}}\nexact_metrics: "
            f"[accuracy]\n"
        )
    return folder


FEDSGD = """
sites: [aa, bbb, cccc]
rounds: 60
algorithm: fedsgd
local_steps: 1
sampling_rate: 0.1
model: task.py:model
data: task.py:data
loss: task.py:loss
optimizer: {name: sgd, lr: 0.2}
privacy: {noise: distributed, noise_multiplier: 1.5, delta: 1.0e-5, max_grad_norm: 1.0}
output: runs
"""


def secure_experiment(folder: Path) -> Path:
    """Three sites with generated data, one step a round; the path of the experiment."""
    return _written(folder, FEDSGD)


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    """As :func:`secure_experiment`, beside the test's other files."""
    return secure_experiment(tmp_path)


def edit(path: Path, old: str, new: str) -> None:
    """Replace a piece of text that must be there."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


__all__ = [
    "Job",
    "Twin",
    "call_cli",
    "descendants",
    "edit",
    "in_threads",
    "processes",
    "run_cli",
    "run_job",
    "run_twin",
    "secure_experiment",
    "start_job",
    "train",
    "trainer_of",
    "wait_for",
    "without_ptrace",
]
assert sys.version_info >= (3, 11)
