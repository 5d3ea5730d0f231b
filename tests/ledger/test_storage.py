"""The file under a ledger: one writer, its owner's only, on a local disk, and never a file that is
somebody else's.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from privfl.errors import DamagedError, PrivflError
from privfl.ledger import Ledger, storage
from privfl.ledger.storage import APPLICATION, Storage, file_system
from tests.conftest import ROOT
from tests.ledger.ledgers import RUN, STEP, a_dozen_rows, by_sql, open_ledger


def refused(
    action: Callable[[], object], *parts: str, kind: type[PrivflError] = PrivflError
) -> None:
    """``action`` ends with one sentence that has all of ``parts``."""
    with pytest.raises(PrivflError) as caught:
        action()
    assert type(caught.value) is kind
    said = str(caught.value)
    assert "\n" not in said
    for part in parts:
        assert part in said


# -- one writer ------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from tests.ledger.ledgers import open_ledger
ledger = open_ledger(Path(sys.argv[1]))
print(len(ledger.rows), flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_second_writer_is_refused_until_the_first_is_killed(path: Path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, cwd=ROOT
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"1\n"
        refused(
            lambda: open_ledger(path),
            "is in use by another run",
            f"process {holder.pid} on {os.uname().nodename}",
            "wait",
        )
        with Ledger.read(path) as ledger:
            assert len(ledger.rows) == 1
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with open_ledger(path) as ledger:
        ledger.charge("training", STEP, RUN, 1)
        refused(lambda: open_ledger(path), "in this process itself: close()")


def test_a_second_writer_is_refused_until_the_first_closes(path: Path):
    first = open_ledger(path)
    refused(lambda: open_ledger(path), "in this process itself: close()")
    first.close()
    first.close()
    open_ledger(path).close()


def test_a_process_that_was_forked_does_not_keep_a_closed_ledger(path: Path):
    """As the workers of a data loader are."""
    ledger = open_ledger(path)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reading, 1)
        os._exit(0)
    try:
        ledger.close()
        open_ledger(path).close()
    finally:
        os.write(writing, b"x")
        os.waitpid(child, 0)


def test_a_second_writer_by_another_name_is_refused(path: Path):
    alias = path.with_name("alias")
    alias.symlink_to(path)
    with open_ledger(path):
        refused(lambda: open_ledger(alias), "in this process itself: close()")


@pytest.mark.parametrize("spoil", ["charge", "site", "text"])
def test_a_failed_opening_leaves_no_lock(path: Path, spoil: str):
    a_dozen_rows(path).close()
    good = path.read_bytes()
    if spoil == "text":
        path.write_text("not a ledger at all\n" * 100)
    elif spoil == "charge":
        by_sql(path, "UPDATE rows SET steps = steps + 1 WHERE kind = 'charge'")
    with pytest.raises(PrivflError) as error:
        Ledger.write(path, "south", {})
    assert "in use" not in str(error.value)
    path.write_bytes(good)
    open_ledger(path).close()
    del error


def test_a_reader_works_beside_a_writer(path: Path):
    with open_ledger(path) as ledger:
        for round_ in range(3):
            ledger.charge("training", STEP, RUN, round_)
            with Ledger.read(path) as look:
                assert look.rows == ledger.rows
            with Ledger.read(path) as look, Ledger.read(path) as other:
                # Both stay open over the next charge.
                ledger.charge("training", STEP, RUN, round_)
                assert look.head == other.head != ledger.head


# -- the file itself -------------------------------------------------------------------------------


def test_it_is_for_its_owner_only(path: Path):
    old = os.umask(0)
    try:
        with open_ledger(path) as ledger:
            ledger.charge("training", STEP, RUN, 1)
            left = sorted(entry.name for entry in path.parent.iterdir())
            assert left == ["north.ledger", "north.ledger.lock"]
            for entry in path.parent.iterdir():
                assert stat.S_IMODE(entry.stat().st_mode) == 0o600
    finally:
        os.umask(old)


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[sqlite3.Connection]:
    """The connections that are opened to ledgers."""
    opened: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def noted(*arguments: Any, **options: Any) -> sqlite3.Connection:
        opened.append(connect(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr(sqlite3, "connect", noted)
    return opened


def test_what_sqlite_was_told(path: Path, connections: list[sqlite3.Connection]):
    with closing(Storage.write(path)) as ledger:
        connection = connections[-1]
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (3,)
        assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION,)
        assert connection.execute("PRAGMA user_version").fetchone() == (storage.VERSION,)
        assert connection.execute("PRAGMA foreign_keys").fetchone() is not None
        assert ledger.sound() == "ok"


def test_a_full_disk_is_one_sentence_and_adds_nothing(
    path: Path, connections: list[sqlite3.Connection]
):
    with a_dozen_rows(path) as ledger:
        before, rows = path.read_bytes(), list(ledger.rows)
        pages = connections[-1].execute("PRAGMA page_count").fetchone()[0]
        connections[-1].execute(f"PRAGMA max_page_count = {pages}")
        spent = ledger.spent("training")
        refused(
            lambda: ledger.begin_run("cd" * 16, {"long": "x" * 100_000}),
            "cannot use the ledger",
            "full",
            "look at its disk",
        )
        assert ledger.rows == rows
        assert (ledger.spent("training") == spent).all()
        assert path.read_bytes() == before
        connections[-1].execute("PRAGMA max_page_count = 100000")
        ledger.charge("training", STEP, RUN, 9)
    with Ledger.read(path) as ledger:
        assert ledger.rows[:-1] == rows
        assert ledger.problems() == []


# -- not a ledger ----------------------------------------------------------------------------------


def foreign(path: Path, *, wal: bool = False) -> None:
    by_sql(
        path,
        *(["PRAGMA journal_mode=WAL"] if wal else []),
        "CREATE TABLE notes (text)",
        "INSERT INTO notes VALUES ('mine')",
    )


def newer(path: Path) -> None:
    a_dozen_rows(path).close()
    by_sql(path, f"PRAGMA user_version = {storage.VERSION + 1}")


def newer_with_an_index(path: Path) -> None:
    a_dozen_rows(path).close()
    by_sql(path, "CREATE INDEX runs ON rows (run)", f"PRAGMA user_version = {storage.VERSION + 1}")


def foreign_rows(path: Path) -> None:
    by_sql(path, "CREATE TABLE rows (a, b)", "INSERT INTO rows VALUES (1, 2)")


def cut_short(path: Path) -> None:
    a_dozen_rows(path).close()
    path.write_bytes(path.read_bytes()[:6000])


NOT_LEDGERS = {
    "text": (lambda path: path.write_text("site: north\n" * 200), "is damaged"),
    "short text": (lambda path: path.write_text("hello"), "is damaged"),
    "database": (foreign, "is not a ledger of privfl"),
    "WAL database": (lambda path: foreign(path, wal=True), "is not a ledger of privfl"),
    "database with such a table": (foreign_rows, "is not a ledger of privfl"),
    "cut": (cut_short, "is damaged"),
    "newer": (newer, "written by a newer privfl (format 2); install that one"),
    "newer with an index": (
        newer_with_an_index,
        "written by a newer privfl (format 2); install that one",
    ),
}


@pytest.mark.parametrize("name", NOT_LEDGERS)
def test_what_is_not_a_ledger_is_refused_and_left_alone(path: Path, name: str):
    make, said = NOT_LEDGERS[name]
    make(path)
    before = path.read_bytes()
    with pytest.raises(PrivflError) as caught:
        open_ledger(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    with pytest.raises(PrivflError, match=r"^(the )?(ledger )?[^\n]*$") as caught:
        Ledger.read(path)
    assert path.read_bytes() == before
    assert {entry.name for entry in path.parent.iterdir()} <= {path.name, path.name + ".lock"}


def test_a_folder_is_refused(path: Path):
    path.mkdir()
    refused(lambda: open_ledger(path), "cannot use the ledger", "Is a directory")
    refused(lambda: Ledger.read(path), "there is no ledger")
    assert list(path.iterdir()) == []


def test_a_folder_that_does_not_exist_is_named(path: Path):
    refused(
        lambda: open_ledger(path / "deeper" / "x"),
        f"cannot use the ledger {path}/deeper/x",
        "No such file",
    )
    refused(lambda: Ledger.read(path), f"there is no ledger {path}")
    assert not path.exists()


def test_an_empty_file_begins_a_ledger(path: Path):
    path.touch()
    refused(lambda: Ledger.read(path), "holds nothing yet")
    with open_ledger(path) as ledger:
        ledger.charge("training", STEP, RUN, 1)
    with Ledger.read(path) as ledger:
        assert len(ledger.rows) == 3


# -- older files -----------------------------------------------------------------------------------


def test_an_older_file_is_brought_up_to_date(path: Path, monkeypatch: pytest.MonkeyPatch):
    with a_dozen_rows(path) as ledger:
        rows = list(ledger.rows)
    asked = []

    def first(connection: sqlite3.Connection) -> None:
        asked.append((1, connection.in_transaction))
        connection.execute("UPDATE rows SET time = time")

    def second(connection: sqlite3.Connection) -> None:
        asked.append((2, connection.in_transaction))

    monkeypatch.setattr(storage, "VERSION", 3)
    monkeypatch.setattr(storage, "MIGRATIONS", {1: first, 2: second})
    with open_ledger(path) as ledger:
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA user_version").fetchone() == (3,)
        assert ledger.rows == rows
        ledger.charge("training", STEP, RUN, 9)
    open_ledger(path).close()
    assert asked == [(1, True), (2, True)]
    monkeypatch.setattr(storage, "VERSION", 1)
    refused(lambda: open_ledger(path), "newer privfl (format 3)")


def test_a_migration_that_fails_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch):
    a_dozen_rows(path).close()
    before = path.read_bytes()

    def half(connection: sqlite3.Connection) -> None:
        connection.execute("DELETE FROM rows WHERE number > 5")
        connection.execute("no such statement")

    monkeypatch.setattr(storage, "VERSION", 2)
    monkeypatch.setattr(storage, "MIGRATIONS", {1: half})
    refused(lambda: open_ledger(path), "syntax error", kind=DamagedError)
    monkeypatch.undo()
    assert path.read_bytes() == before
    with open_ledger(path) as ledger:
        assert len(ledger.rows) == 12


def test_a_migration_may_add_to_the_file(path: Path, monkeypatch: pytest.MonkeyPatch):
    a_dozen_rows(path).close()
    monkeypatch.setattr(storage, "VERSION", 2)
    monkeypatch.setattr(
        storage,
        "MIGRATIONS",
        {1: lambda connection: connection.execute("CREATE INDEX runs ON rows (run)")},
    )
    for _ in range(2):
        with open_ledger(path) as ledger:
            assert len(ledger.rows) == 12


# -- network file systems --------------------------------------------------------------------------

MOUNTS = r"""
21 1 254:0 / / rw,relatime - ext4 /dev/vda rw
22 21 0:20 / /proc rw - proc proc rw
23 21 0:50 / /home rw shared:1 - nfs4 server:/home rw,vers=4.2
24 23 254:1 / /home/local rw shared:2 master:3 - xfs /dev/vdb rw
25 21 0:51 / /mnt/my\040group\040disk rw - lustre 10.0.0.1@tcp:/scratch rw
26 21 0:52 / /mnt/remote rw - fuse.sshfs me@there:/ rw
27 21 0:53 / /twice rw - ext4 /dev/vdc rw
28 27 0:54 / /twice rw - cifs //server/share rw
29 21 0:55 / /mnt/donn\303\251es rw - nfs server:/d rw
30 21 0:56 / /mnt/été rw - beegfs beegfs_nodev rw
31 21 0:57 / /mnt/back\134slash rw - gpfs gpfs rw
32 21 0:58 / /tmp rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/etc/north.ledger", "ext4"),
        ("/north.ledger", "ext4"),
        ("/home/me/deep/er/north.ledger", "nfs4"),
        ("/home/north.ledger", "nfs4"),
        ("/homework/north.ledger", "ext4"),
        ("/home/local/north.ledger", "xfs"),
        ("/home/locals/north.ledger", "nfs4"),
        ("/mnt/my group disk/x/north.ledger", "lustre"),
        ("/mnt/my/north.ledger", "ext4"),
        ("/mnt/remote/north.ledger", "sshfs"),
        ("/twice/north.ledger", "cifs"),
        ("/mnt/données/north.ledger", "nfs"),
        ("/mnt/été/north.ledger", "beegfs"),
        ("/mnt/back\\slash/north.ledger", "gpfs"),
        ("/home/me/../../tmp/north.ledger", "tmpfs"),
    ],
)
def test_the_file_system_of_a_path(tmp_path: Path, path: str, kind: str):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS.lstrip(), encoding="utf-8")
    assert file_system(Path(path), mounts=str(mounts)) == kind


def test_the_file_system_behind_a_link(tmp_path: Path):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        f"21 1 254:0 / / rw - ext4 /dev/vda rw\n22 21 0:1 / {tmp_path}/far rw - nfs server:/ rw\n"
    )
    (tmp_path / "far").mkdir()
    (tmp_path / "near").symlink_to(tmp_path / "far")
    assert file_system(tmp_path / "near" / "x", mounts=str(mounts)) == "nfs"
    (tmp_path / "ledger").symlink_to(tmp_path / "far" / "ledger")
    assert file_system(tmp_path / "ledger", mounts=str(mounts)) == "nfs"


def test_a_system_that_does_not_say(tmp_path: Path):
    assert file_system(tmp_path / "x", mounts=str(tmp_path / "none")) == ""
    assert file_system(tmp_path / "x") != ""


@pytest.mark.parametrize(
    "kind", ["nfs", "nfs4", "cifs", "lustre", "sshfs", "gpfs", "beegfs", "ceph"]
)
def test_a_network_file_system_needs_leave(path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    monkeypatch.setattr(storage, "file_system", lambda _: kind)
    refused(
        lambda: Ledger.write(path, "north", {}),
        f"network file system ({kind})",
        "network_file_system: true",
    )
    assert list(path.parent.iterdir()) == []
    with Ledger.write(path, "north", {}, network=True) as ledger:
        ledger.charge("training", STEP, RUN, 1)
    Ledger.read(path).close()


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs", ""])
def test_a_local_file_system_does_not(path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    monkeypatch.setattr(storage, "file_system", lambda _: kind)
    open_ledger(path).close()
