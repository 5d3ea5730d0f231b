"""What a newcomer gets wrong: one sentence, once per job, exit code 2 at every rank, and nothing
half done.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import (
    PRIVFL,
    Job,
    descendants,
    edit,
    run_cli,
    run_job,
    run_twin,
    start_job,
    train,
    trainer_of,
    wait_for,
)


def one_sentence(job: Job, *parts: str, code: int = 2) -> None:
    """The job ended with ``code`` and said one sentence that has all of ``parts``."""
    assert job.code == code, job.err
    said = [line for line in job.err.splitlines() if line.startswith("privfl: ")]
    assert len(said) == 1, job.err
    for part in parts:
        assert part in said[0]
    assert "Traceback" not in job.err + job.out


def no_trainer_ran(folder: Path) -> None:
    assert not list(folder.rglob("site.log"))


def refused(
    small: Path, tmp_path: Path, *settings: str, sites: Path | None = None, ranks: int = 3
) -> Job:
    """The in-process run, which all ranks must end as users' mistakes; what its screen shows."""
    twin = run_twin(small, *settings, output=tmp_path / "o", ranks=ranks, sites=sites)
    assert twin.codes == [2] * ranks, twin.err
    return Job(2, twin.out, twin.err)


# -- before any trainer starts ---------------------------------------------------------------------


def test_too_few_ranks(small: Path, tmp_path: Path):
    job = train(2, small, "--output", tmp_path / "o")
    one_sentence(
        job,
        "2 sites and needs 3 MPI ranks",
        "started with 2 ranks",
        f"mpiexec -n 3 privfl train {small} --output {tmp_path}/o",
    )
    no_trainer_ran(tmp_path)


def test_too_many_ranks(small: Path, tmp_path: Path):
    one_sentence(
        refused(small, tmp_path, ranks=4), "2 sites and needs 3 MPI ranks", "started with 4 ranks"
    )
    no_trainer_ran(tmp_path)


def test_not_under_mpiexec(small: Path):
    job = run_cli("train", small)
    one_sentence(job, "was not started under mpiexec", f"mpiexec -n 3 privfl train {small}")


def test_the_demo_not_under_mpiexec():
    one_sentence(run_cli("train"), "mpiexec -n 5 privfl train")


def test_a_launcher_whose_ranks_do_not_find_each_other(small: Path):
    """Real processes of a real launcher, each alone in its MPI world, as with a wrong `srun
    --mpi`.
    """
    job = run_job(3, ["env", "-u", "PMI_FD", "-u", "PMI_PORT", PRIVFL, "train", str(small)])
    one_sentence(
        job, "the launcher started 3 processes, but MPI sees each of them alone", "srun --mpi=pmi2"
    )


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        (
            "privacy.target_epsilom=1",
            "unknown key 'privacy.target_epsilom'; did you mean 'target_epsilon'?",
        ),
        ("sampling_rate=2", "sampling_rate must be less than or equal to 1, got 2"),
        ("model=task.py:modle", "did you mean 'model'?"),
    ],
)
def test_a_wrong_key_or_value(small: Path, tmp_path: Path, setting: str, part: str):
    one_sentence(refused(small, tmp_path, setting), part)
    no_trainer_ran(tmp_path)


def test_an_unknown_option():
    one_sentence(train(3, "--sits", "x"), "No such option '--sits'", "privfl train --help")


def test_an_unreachable_target(small: Path, tmp_path: Path):
    edit(small, "noise_multiplier: 1.5", "target_epsilon: 1e-9")
    one_sentence(refused(small, tmp_path), "privacy.target_epsilon 1e-09 cannot be reached")
    no_trainer_ran(tmp_path)


def test_a_missing_site_file(small: Path, tmp_path: Path):
    (tmp_path / "sites").mkdir()
    (tmp_path / "sites" / "aa.yaml").write_text("device: cpu\n")
    job = refused(small, tmp_path, sites=tmp_path / "sites")
    one_sentence(job, "cannot read the file of site bbb", "sites/bbb.yaml")


def test_one_name_for_two_ranks(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PRIVFL_SITE", "aa")
    one_sentence(refused(small, tmp_path), "both are site 'aa'", "PRIVFL_SITE")
    monkeypatch.setenv("PRIVFL_SITE", "cc")
    one_sentence(refused(small, tmp_path), "PRIVFL_SITE is 'cc'")


def test_a_run_folder_that_cannot_be_made(small: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    one_sentence(refused(small, tmp_path / "file"), "cannot create the run folder", "--output")


@pytest.fixture(params=["star", "reduce"])
def summing(request: pytest.FixtureRequest, small: Path, tmp_path: Path) -> Callable[..., Job]:
    """A run with more keys for its sums: only those that MPI adds need MPI."""
    if request.param == "star":
        request.getfixturevalue("trainers_as_threads")
        return lambda keys="": refused(small, tmp_path, f"secure_aggregation={{path: star{keys}}}")
    return lambda keys="": train(
        3, small, "--output", tmp_path / "o", "--set", f"secure_aggregation={{path: reduce{keys}}}"
    )


def test_a_site_that_cannot_contribute_hangs_no_sum(summing: Callable[..., Job]):
    """Where MPI adds, the others are in the middle of a collective by then."""
    one_sentence(summing(", range: 1.0e-6"), "values beyond the public range 1e-06")


def test_a_metric_that_raises_in_the_middle_of_a_sum_hangs_nobody(
    summing: Callable[..., Job], small: Path
):
    edit(
        small.parent / "task.py",
        "    return (output.argmax(dim=1) == target).sum(), len(target)",
        "    import sys, threading; thread = threading.current_thread().name\n"
        "    site = sys.argv[1] if thread == 'MainThread' else thread\n"
        "    calls.append(site)\n"
        "    assert site != 'bbb' or calls.count(site) < 2\n"
        "    return (output.argmax(dim=1) == target).sum(), len(target)",
    )
    edit(small.parent / "task.py", "def model():", "calls = []\n\n\ndef model():")
    one_sentence(
        summing(),
        "site bbb: evaluating model and metrics on the evaluation records raised AssertionError",
    )


# -- in the trainer --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        (
            "return nn.Linear(5, 2)",
            "return nn.Sequential(nn.BatchNorm1d(5, affine=False), nn.Linear(5, 2))",
            ("BatchNorm1d", "GroupNorm"),
        ),
        (
            "def data(site, shift=0.0):",
            "def data(site, folder, shift=0.0):",
            ("missing a required argument: 'folder'", "--sites"),
        ),
        (
            "x[:100], y[:100]",
            "x[:100].double(), y[:100]",
            ("inputs of data() are torch.float64", "x.float()"),
        ),
        ("x[:100], y[:100]", "x[:0], y[:0]", ("no training records",)),
        (
            "x[:100], y[:100]",
            "x[:7], y[:7]",
            ("7 training records at sampling_rate 0.1", "at least 0.14"),
        ),
        (
            "generator = ",
            "raise FileNotFoundError('no records on this disk'); generator = ",
            (
                "data (task.py:data) raised FileNotFoundError in line 12 of task.py; read what it "
                "said in /",
            ),
        ),
        (
            "return nn.functional.cross_entropy(output, target)",
            "return output.sum() * float('nan')",
            ("NaN or infinite", "loss()"),
        ),
        (
            "return nn.Linear(5, 2)",
            "return nn.Linear(4, 2)",
            (
                "model() does not take inputs of shape (5,), torch.float32",
                "shapes cannot be multiplied",
                "site.log",
            ),
        ),
        # The thread of a trainer has the name of its site.
        (
            "return nn.Linear(5, 2)",
            "import threading; return nn.Linear(5, len(threading.current_thread().name))",
            ("another number of trainable parameters at some sites (aa 12, bbb 18)",),
        ),
        (
            "return nn.Linear(5, 2)",
            "import threading; torch.manual_seed(len(threading.current_thread().name)); return "
            "nn.Linear(5, 2)",
            ("different initial parameters",),
        ),
    ],
    ids=[
        "BatchNorm",
        "missing option",
        "float64",
        "no records",
        "too few",
        "data raises",
        "NaN loss",
        "wrong shapes",
        "other model",
        "other seed",
    ],
)
@pytest.mark.usefixtures("trainers_as_threads")
def test_user_code_that_does_not_work(
    small: Path, tmp_path: Path, old: str, new: str, parts: tuple[str, ...]
):
    user_code_is_refused(small, tmp_path, old, new, parts)


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        (
            "generator = ",
            "import sys; sys.exit(0); generator = ",
            (
                "data (task.py:data) raised SystemExit in line 12 of task.py; read what it said in "
                "/",
            ),
        ),
        (
            "import torch\n",
            "import torch\nimport mpi4py.MPI\n",
            ("importing task.py raised ModuleNotFoundError",),
        ),
    ],
    ids=["data exits", "mpi4py"],
)
def test_user_code_that_does_not_work_in_a_process(
    small: Path, tmp_path: Path, old: str, new: str, parts: tuple[str, ...]
):
    """What only a trainer that is a process survives or forbids."""
    user_code_is_refused(small, tmp_path, old, new, parts)


def user_code_is_refused(
    small: Path, tmp_path: Path, old: str, new: str, parts: tuple[str, ...]
) -> None:
    edit(small.parent / "task.py", old, new)
    one_sentence(refused(small, tmp_path), *parts)
    assert not list(tmp_path.rglob("summary.json"))


def test_what_user_code_says_stays_at_its_site(small: Path, tmp_path: Path):
    """Messages of exceptions quote records; the sentence that crosses the wire must not."""
    edit(
        small.parent / "task.py",
        "generator = ",
        "assert site != 'bbb' or float('MUELLER,Hans,HIV+'); generator = ",
    )
    job = train(3, small, "--output", tmp_path / "o")
    (log,) = tmp_path.rglob("sites/bbb/site.log")
    one_sentence(
        job,
        "site bbb: data (task.py:data) raised ValueError in line 12 of task.py; read what it said "
        f"in {log}",
    )
    assert "MUELLER" not in job.err + job.out
    assert "MUELLER" in log.read_text()
    assert "MUELLER" not in "".join(p.read_text() for p in tmp_path.rglob("sites/aa/*.log"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_for_the_log_hangs_nobody(small: Path, tmp_path: Path):
    (tmp_path / "sites").mkdir()
    for site in ("aa", "bbb"):
        (tmp_path / "sites" / f"{site}.yaml").write_text("log: /dev/full\n")
    edit(small.parent / "task.py", "generator = ", "print('x'); raise OSError('y'); generator = ")
    job = train(3, small, "--sites", tmp_path / "sites", "--output", tmp_path / "o")
    assert job.code in (1, 2)
    assert job.err.count("privfl: ") == 1, job.err


@pytest.mark.usefixtures("trainers_as_threads")
def test_odd_bytes_in_an_error_hang_nobody(small: Path, tmp_path: Path):
    edit(
        small.parent / "task.py",
        "return nn.Linear(5, 2)",
        "from privfl.errors import PrivflError; import os; raise PrivflError('no ' + "
        "os.fsdecode(b'/M\\xfcller'))",
    )
    one_sentence(refused(small, tmp_path), "no /M")


def test_odd_keys_in_options_are_refused(small: Path, tmp_path: Path):
    one_sentence(refused(small, tmp_path, "data_options={labels: {0: absent}}"), "data_options")


@pytest.mark.usefixtures("trainers_as_threads")
def test_a_device_that_is_not_there(small: Path, tmp_path: Path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has the device that the test needs to be missing")
    (tmp_path / "sites").mkdir()
    for site in ("aa", "bbb"):
        (tmp_path / "sites" / f"{site}.yaml").write_text("device: cuda\n")
    one_sentence(refused(small, tmp_path, sites=tmp_path / "sites"), "device cuda")


# -- death -----------------------------------------------------------------------------------------


SLOW = "def loss(output, target):\n    import time; time.sleep(0.5)"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks for the trainer in /proc")


def after_round_1(small: Path, tmp_path: Path) -> subprocess.Popen[str]:
    """A job of many slow rounds that has finished the first one."""
    edit(small.parent / "task.py", "def loss(output, target):", SLOW)
    job = start_job(
        3, [PRIVFL, "train", str(small), "--output", str(tmp_path / "o"), "--set", "rounds=200"]
    )
    wait_for(
        lambda: any(path.read_text().count("\n") for path in tmp_path.rglob("rounds.jsonl")), job
    )
    return job


@LINUX
def test_a_killed_trainer_is_reported_in_one_sentence(small: Path, tmp_path: Path):
    process = after_round_1(small, tmp_path)
    os.kill(trainer_of(process, "bbb"), signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    one_sentence(
        Job(process.returncode, out, err),
        "site bbb: the trainer was killed by signal SIGKILL (perhaps out of memory)",
        "site.log",
    )


@LINUX
def test_a_killed_trainer_is_noticed_although_its_children_live(small: Path, tmp_path: Path):
    """The child keeps the trainer's end of the link open for longer than the job may take."""
    edit(
        small.parent / "task.py",
        "generator = ",
        "import os, time; (site == 'bbb' and os.fork() == 0) and time.sleep(300); generator = ",
    )
    process = after_round_1(small, tmp_path)
    os.kill(trainer_of(process, "bbb"), signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    one_sentence(
        Job(process.returncode, out, err), "site bbb: the trainer was killed by signal SIGKILL"
    )


@LINUX
def test_trainers_do_not_outlive_their_job(small: Path, tmp_path: Path):
    """Killed with its launcher and all ranks, while the trainers are in the middle of a step."""
    busy = "    import sys, time; open(f'{__file__}.{sys.argv[1]}', 'w').close(); time.sleep(600)"
    edit(
        small.parent / "task.py", "def loss(output, target):", "def loss(output, target):\n" + busy
    )
    process = start_job(3, [PRIVFL, "train", str(small), "--output", str(tmp_path / "o")])
    wait_for(lambda: len(list(tmp_path.glob("task.py.*"))) == 2, process)
    pids = [trainer_of(process, "aa"), trainer_of(process, "bbb")]
    ranks = [pid for pid, words in descendants(process.pid).items() if str(small) in words]
    process.kill()
    process.communicate()
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 15
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@LINUX
def test_of_two_jobs_each_finds_its_own_trainer():
    """Two real launchers, each with a rank whose child has the command line of site bbb's trainer.

    The child ends with the rank, which holds its input open.
    """
    child = "[sys.executable, '-c', 'input()', 'trainer', 'bbb']"
    rank = f"import subprocess, sys; subprocess.Popen({child}, stdin=subprocess.PIPE).wait()"
    jobs = [start_job(1, [sys.executable, "-c", rank]) for _ in range(2)]
    try:
        pids = [trainer_of(job, "bbb") for job in jobs]
        own = [set(descendants(job.pid)) for job in jobs]
        assert own[0].isdisjoint(own[1])
        assert pids[0] in own[0]
        assert pids[1] in own[1]
    finally:
        for job in jobs:
            job.kill()
            job.communicate()
