"""Rank 0 never holds the secret key: its whole memory is searched for each word of it after
everything it does.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from privacy_audits.targets import memory
from tests.conftest import PRIVFL, edit, processes, start_job, without_ptrace

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/PID/mem")


class Search:
    """Finds the words of a key in the memory of a process.

    Args:
        words: 64-bit numbers, which lie aligned in memory.
        pieces: bytes that may lie anywhere, 15 or more each. Wherever a piece lies, one of its
            first 8 runs of 8 bytes is aligned.
    """

    def __init__(self, words: np.ndarray, pieces: list[bytes]) -> None:
        runs = [np.frombuffer(piece[k : k + 8], np.uint64)[0] for piece in pieces for k in range(8)]
        self._words, self._pieces = words, np.array(runs, np.uint64).reshape(-1, 8)
        self._sought = np.unique(np.concatenate([words, self._pieces.ravel()]))

    def __call__(self, pid: int) -> tuple[int, int]:
        """(distinct words that occur, pieces that occur) in the memory of a process.

        Sites are not dumpable, so that only root finds something there.
        """
        present = memory.present(pid, self._sought)
        return (
            int(np.isin(self._words, present).sum()),
            int(np.isin(self._pieces, present).any(axis=1).sum()),
        )


def ranks(word: str) -> dict[int, int]:
    """PID by MPI rank of the running job whose command line has ``word``."""
    by_rank: dict[int, int] = {}
    # In order, because a child that is just being started still looks like its parent.
    for pid, words in sorted(processes().items()):
        if word in words and not words[0].endswith("mpiexec"):
            with contextlib.suppress(OSError):
                rank = re.search(
                    rb"(?:^|\0)PMI_RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes()
                )
                if rank:
                    by_rank.setdefault(int(rank[1]), pid)
    return by_rank


def stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60
) -> bool:
    """Whether the condition came true before the job ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "the job hangs"
        time.sleep(0.005)
    return True


def test_rank_0_holds_no_word_of_the_secret_key(small: Path, tmp_path: Path):
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if scope.exists() and scope.read_text().strip() != "0" and os.geteuid() != 0:
        pytest.skip("this system does not let a process read another's memory")
    spied = tmp_path / "words"
    process = start_job(
        3,
        [
            sys.executable,
            "-m",
            "tests.jobs.key_spy",
            str(spied),
            "train",
            str(small),
            "--output",
            str(tmp_path / "o"),
            "--set",
            "rounds=2",
        ],
    )
    try:
        assert wait_for(spied.exists, process), process.communicate()[1]
        secrets = spied.read_bytes()
        # The secret shared by the sites, then SEAL's key, which ends in 4096 words.
        raw = np.frombuffer(secrets[-8 * 4096 :], dtype=np.uint64)
        words = np.unique(raw[raw > 1 << 40])
        assert len(words) > 4000
        pieces = [
            secrets[:32],
            *(secrets[i : i + 24] for i in range(5000, len(secrets) - 24, len(secrets) // 4)),
        ]
        pids = ranks(str(small))
        assert set(pids) == {0, 1, 2}
        search, looks, at_sites = Search(words, pieces), 0, []
        while wait_for(lambda: stopped(pids[0]), process):
            at_coordinator = search(pids[0])
            assert at_coordinator == (0, 0), (
                f"look {looks}: rank 0 holds (words, pieces) of the keys: {at_coordinator}"
            )
            looks += 1
            if looks == 30 and os.geteuid() == 0:
                at_sites = [search(pids[rank]) for rank in (1, 2)]
            os.kill(pids[0], signal.SIGCONT)
        _, err = process.communicate(timeout=60)
    finally:
        for pid in ranks(str(small)).values():
            os.kill(pid, signal.SIGKILL)
        process.kill()
    assert process.returncode == 0, err
    assert looks >= 30, "rank 0 was looked at after everything it did"
    if os.geteuid() == 0:
        assert [site[0] for site in at_sites] == [len(words)] * 2, (
            "the same search finds the whole key at every site"
        )
        assert all(site[1] >= 1 for site in at_sites)


def test_a_site_cannot_be_read_by_others_and_leaves_no_core(small: Path, tmp_path: Path):
    """By processes of the same user; root always can.

    The coordinator, which holds no key, can be read: the test can tell the difference.
    """
    edit(
        small.parent / "task.py",
        "def loss(output, target):",
        "def loss(output, target):\n    import time; time.sleep(0.2)",
    )
    process = start_job(
        3,
        [
            *without_ptrace(),
            PRIVFL,
            "train",
            str(small),
            "--output",
            str(tmp_path / "o"),
            "--set",
            "rounds=200",
        ],
    )
    look = (
        "import sys\nfor pid in sys.argv[1:]:\n try: open(f'/proc/{pid}/mem', 'rb'); "
        "print('readable')\n except PermissionError: print('closed')"
    )
    try:
        assert wait_for(lambda: bool(list(tmp_path.rglob("site.log"))), process)
        pids = ranks(str(small))
        asked = [
            *without_ptrace(),
            sys.executable,
            "-c",
            look,
            *(str(pids[rank]) for rank in (0, 1, 2)),
        ]
        seen = subprocess.run(asked, capture_output=True, text=True, check=True)
        assert seen.stdout.split() == ["readable", "closed", "closed"]
        for rank in (1, 2):
            limits = Path(f"/proc/{pids[rank]}/limits").read_text()
            assert re.search(r"Max core file size +0 +0 ", limits)
    finally:
        process.kill()
        process.communicate()
        for pid, words in processes().items():
            if str(small) in words:
                os.kill(pid, signal.SIGKILL)
