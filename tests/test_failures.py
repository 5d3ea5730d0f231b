"""What a newcomer gets wrong: one sentence, once per job, exit code 2 at every rank, and nothing
half done.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import (
    PRIVFL,
    Job,
    edit,
    processes,
    run_cli,
    run_job,
    run_twin,
    start_job,
    train,
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


def timed(limit: float, *arguments: object, ranks: int = 3, **options: object) -> Job:
    started = time.monotonic()
    job = train(ranks, *arguments, **options)
    assert time.monotonic() - started < limit, "too slow to be told"
    return job


# -- before any trainer starts ---------------------------------------------------------------------

# The bar for these is 5 s on an idle machine; the limit in the test leaves room for a busy
# one.
EARLY = 15


@pytest.mark.parametrize("ranks", [2, 4])
def test_wrong_number_of_ranks(small: Path, tmp_path: Path, ranks: int):
    job = timed(EARLY, small, "--output", tmp_path / "o", ranks=ranks)
    one_sentence(
        job,
        "2 sites and needs 3 MPI ranks",
        f"started with {ranks} ranks",
        f"mpiexec -n 3 privfl train {small} --output {tmp_path}/o",
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
    one_sentence(timed(EARLY, small, "--output", tmp_path / "o", "--set", setting), part)
    no_trainer_ran(tmp_path)


def test_an_unknown_option():
    one_sentence(train(3, "--sits", "x"), "No such option '--sits'", "privfl train --help")


def test_an_unreachable_target(small: Path, tmp_path: Path):
    edit(small, "noise_multiplier: 1.5", "target_epsilon: 1e-9")
    one_sentence(
        timed(EARLY, small, "--output", tmp_path / "o"),
        "privacy.target_epsilon 1e-09 cannot be reached",
    )
    no_trainer_ran(tmp_path)


def test_a_missing_site_file(small: Path, tmp_path: Path):
    (tmp_path / "sites").mkdir()
    (tmp_path / "sites" / "aa.yaml").write_text("device: cpu\n")
    job = train(3, small, "--sites", tmp_path / "sites", "--output", tmp_path / "o")
    one_sentence(job, "cannot read the file of site bbb", "sites/bbb.yaml")


def test_one_name_for_two_ranks(small: Path, tmp_path: Path):
    one_sentence(
        train(3, small, "--output", tmp_path / "o", env={"PRIVFL_SITE": "aa"}),
        "both are site 'aa'",
        "PRIVFL_SITE",
    )
    one_sentence(
        train(3, small, "--output", tmp_path / "o", env={"PRIVFL_SITE": "cc"}),
        "PRIVFL_SITE is 'cc'",
    )


def test_a_run_folder_that_cannot_be_made(small: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    one_sentence(
        train(3, small, "--output", tmp_path / "file" / "o"),
        "cannot create the run folder",
        "--output",
    )


@pytest.mark.parametrize("path", ["star", "reduce"])
def test_a_site_that_cannot_contribute_hangs_no_sum(small: Path, tmp_path: Path, path: str):
    """Where MPI adds, the others are in the middle of a collective by then."""
    job = timed(
        45,
        small,
        "--output",
        tmp_path / "o",
        "--set",
        f"secure_aggregation={{path: {path}, range: 1.0e-6}}",
    )
    one_sentence(job, "values beyond the public range 1e-06")


@pytest.mark.parametrize("path", ["star", "reduce"])
def test_a_metric_that_raises_in_the_middle_of_a_sum_hangs_nobody(
    small: Path, tmp_path: Path, path: str
):
    edit(
        small.parent / "task.py",
        "    return (output.argmax(dim=1) == target).sum(), len(target)",
        "    import sys; calls.append(1); assert len(calls) < 2 or sys.argv[1] != 'bbb'\n"
        "    return (output.argmax(dim=1) == target).sum(), len(target)",
    )
    edit(small.parent / "task.py", "def model():", "calls = []\n\n\ndef model():")
    job = timed(45, small, "--output", tmp_path / "o", "--set", f"secure_aggregation.path={path}")
    one_sentence(
        job, "site bbb: evaluating model and metrics on the held-out records raised AssertionError"
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
            "generator = ",
            "import sys; sys.exit(0); generator = ",
            ("data (task.py:data) raised SystemExit",),
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
        (
            "return nn.Linear(5, 2)",
            "import sys; return nn.Linear(5, len(sys.argv[1]))",
            ("another number of trainable parameters at some sites (aa 12, bbb 18)",),
        ),
        (
            "return nn.Linear(5, 2)",
            "import sys; torch.manual_seed(len(sys.argv[1])); return nn.Linear(5, 2)",
            ("different initial parameters",),
        ),
        (
            "import torch\n",
            "import torch\nimport mpi4py.MPI\n",
            ("importing task.py raised ModuleNotFoundError",),
        ),
    ],
    ids=[
        "BatchNorm",
        "missing option",
        "float64",
        "no records",
        "too few",
        "data raises",
        "data exits",
        "NaN loss",
        "wrong shapes",
        "other model",
        "other seed",
        "mpi4py",
    ],
)
def test_user_code_that_does_not_work(
    small: Path, tmp_path: Path, old: str, new: str, parts: tuple[str, ...]
):
    edit(small.parent / "task.py", old, new)
    twin = run_twin(small, output=tmp_path / "o", ranks=3)
    assert twin.codes == [2, 2, 2]
    one_sentence(Job(2, twin.out, twin.err), *parts)
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
        f"site bbb: data (task.py:data) raised ValueError in line 12 of task.py; read what it said "
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
    job = timed(60, small, "--sites", tmp_path / "sites", "--output", tmp_path / "o")
    assert job.code in (1, 2)
    assert job.err.count("privfl: ") == 1, job.err


def test_odd_bytes_in_an_error_hang_nobody(small: Path, tmp_path: Path):
    edit(
        small.parent / "task.py",
        "return nn.Linear(5, 2)",
        "from privfl.errors import PrivflError; import os; raise PrivflError('no ' + "
        "os.fsdecode(b'/M\\xfcller'))",
    )
    one_sentence(timed(60, small, "--output", tmp_path / "o"), "no /M")


def test_dates_and_odd_keys_in_options_are_refused(small: Path, tmp_path: Path):
    for value in ("{day: 2020-02-03}", "{labels: {0: absent}}"):
        one_sentence(
            train(3, small, "--output", tmp_path / "o", "--set", f"data_options={value}"),
            "data_options",
        )
    one_sentence(
        train(3, small, "--output", tmp_path / "o", "--set", "data_options={day: 2020-02-30}"),
        "not valid YAML",
    )


def test_a_device_that_is_not_there(small: Path, tmp_path: Path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has the device that the test needs to be missing")
    (tmp_path / "sites").mkdir()
    for site in ("aa", "bbb"):
        (tmp_path / "sites" / f"{site}.yaml").write_text("device: cuda\n")
    one_sentence(
        train(3, small, "--sites", tmp_path / "sites", "--output", tmp_path / "o"), "device cuda"
    )


# -- death -----------------------------------------------------------------------------------------


def _trainer_of(site: str, limit: float = 60) -> int:
    """The process whose command line names the trainer of this site."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        for pid, words in processes().items():
            if "privfl.trainer.main" in words and site in words:
                return pid
        time.sleep(0.05)
    raise AssertionError(f"no trainer of {site} appeared")


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the trainer in /proc")
def test_a_killed_trainer_is_reported_in_one_sentence(small: Path, tmp_path: Path):
    edit(
        small.parent / "task.py",
        "def loss(output, target):",
        "def loss(output, target):\n    import time; time.sleep(0.5)",
    )
    process = start_job(
        3, [PRIVFL, "train", str(small), "--output", str(tmp_path / "o"), "--set", "rounds=200"]
    )
    pid = _trainer_of("bbb")
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("experiment.yaml")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(6)
    os.kill(pid, signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    one_sentence(
        Job(process.returncode, out, err),
        "site bbb: the trainer was killed by signal SIGKILL (perhaps out of memory)",
        "site.log",
    )


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the trainer in /proc")
def test_a_killed_trainer_is_noticed_although_its_children_live(small: Path, tmp_path: Path):
    edit(
        small.parent / "task.py",
        "generator = ",
        "import os, time; (site == 'bbb' and os.fork() == 0) and time.sleep(300); generator = ",
    )
    edit(
        small.parent / "task.py",
        "def loss(output, target):",
        "def loss(output, target):\n    import time; time.sleep(0.5)",
    )
    process = start_job(
        3, [PRIVFL, "train", str(small), "--output", str(tmp_path / "o"), "--set", "rounds=200"]
    )
    pid = _trainer_of("bbb")
    time.sleep(8)
    os.kill(pid, signal.SIGKILL)
    started = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - started < 15
    one_sentence(
        Job(process.returncode, out, err), "site bbb: the trainer was killed by signal SIGKILL"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the trainer in /proc")
def test_trainers_do_not_outlive_their_job(small: Path, tmp_path: Path):
    edit(
        small.parent / "task.py",
        "def loss(output, target):",
        "def loss(output, target):\n    import time; time.sleep(600)",
    )
    process = start_job(3, [PRIVFL, "train", str(small), "--output", str(tmp_path / "o")])
    pids = [_trainer_of("aa"), _trainer_of("bbb")]
    time.sleep(8)
    process.kill()
    process.communicate()
    for pid, words in processes().items():
        if str(small) in words:
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 15
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
