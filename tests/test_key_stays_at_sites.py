"""Rank 0 never holds the secret key: its whole memory is searched for each word of it, again and again while a run goes on."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import edit, start_job

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/PID/mem")


def memory_words(pid: int, words: np.ndarray) -> int:
    """How many of the distinct 64-bit ``words`` occur, aligned, anywhere in the readable memory of a process."""
    found = np.zeros(len(words), dtype=bool)
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            region = re.match(r"([0-9a-f]+)-([0-9a-f]+) r\S+ \S+ \S+ \S+ *(.*)", line)
            if region is None or region[3].startswith(("[vvar", "[vsyscall")):
                continue
            start, end = int(region[1], 16), int(region[2], 16)
            while start < end:
                size = min(end - start, 64 << 20)
                try:
                    memory.seek(start)
                    data = memory.read(size)
                except OSError:
                    break
                values = np.frombuffer(data[: len(data) // 8 * 8], dtype=np.uint64)
                # Key words have up to 60 bits, all of them random: anything small is not one.
                values = values[values > 1 << 40]
                positions = np.searchsorted(words, values)
                positions[positions == len(words)] = 0
                found[positions[words[positions] == values]] = True
                start += size
    return int(found.sum())


def ranks(word: str) -> dict[int, int]:
    """PID by MPI rank of the running job whose command line has ``word``."""
    by_rank = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue
        rank = re.search(rb"(?:^|\0)PMI_RANK=(\d+)", environment)
        if word.encode() in command and b"key_spy" in command and b"mpiexec" not in command and rank:
            by_rank[int(rank[1])] = int(entry.name)
    return by_rank


def test_rank_0_holds_no_word_of_the_secret_key(small: Path, tmp_path: Path):
    if (
        Path("/proc/sys/kernel/yama/ptrace_scope").exists()
        and Path("/proc/sys/kernel/yama/ptrace_scope").read_text().strip() not in "0"
    ):
        readable = subprocess.run(["id", "-u"], capture_output=True, text=True, check=True).stdout.strip() == "0"
        if not readable:
            pytest.skip("this system does not let a process read another's memory")
    edit(small.parent / "task.py", "def loss(output, target):", "def loss(output, target):\n    import time; time.sleep(0.05)")
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
            "rounds=30",
        ],
    )
    try:
        deadline = time.monotonic() + 60
        while not spied.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        assert spied.exists(), process.communicate()[1]
        raw = np.frombuffer(spied.read_bytes(), dtype=np.uint64)
        words = np.unique(raw[raw > 1 << 40])
        # 4096 words modulo each of the two primes (60 and 49 bits).
        assert len(words) > 8000
        pids = ranks(str(small))
        assert set(pids) == {0, 1, 2}
        looks = at_coordinator = at_sites = 0
        while process.poll() is None:
            try:
                at_coordinator = max(at_coordinator, memory_words(pids[0], words))
                if looks % 5 == 4:
                    at_sites = max(at_sites, min(memory_words(pids[1], words), memory_words(pids[2], words)))
                looks += 1
            except (OSError, ProcessLookupError):
                break
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert looks >= 10, "the run was over before it could be looked at"
    assert at_sites == len(words), "the same search finds the whole key at every site"
    assert at_coordinator == 0, f"rank 0 held {at_coordinator} words of the secret key"
