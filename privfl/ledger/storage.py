"""The SQLite file under a ledger: rows go in all together or not at all, and survive whatever ends
the process or the machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from privfl.errors import DamagedError, PrivflError
from privfl.ledger.rows import CREATE, INSERT, SELECT, START, Row, chained, checked

APPLICATION: Final = 0x70766C67  # "pvlg"
VERSION: Final = 1
# By version: how to bring a file of that version to the next one. No column of a row may change.
MIGRATIONS: dict[int, Callable[[sqlite3.Connection], None]] = {}

# How long a writer waits for a reader in the middle of a transaction.
_BUSY_SECONDS = 10.0
# File systems that are shared between machines: their locks and flushes may not be what SQLite
# needs.
_NETWORK = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "afs",
    "ceph",
    "lustre",
    "gpfs",
    "beegfs",
    "9p",
    "pvfs2",
    "orangefs",
    "glusterfs",
    "panfs",
    "sshfs",
}


class Storage:
    """One file, for reading or for its one writer. Open it with :meth:`write` or :meth:`read`.

    Guarantee: When :meth:`add` returns, its rows are on the disk, and no other process has written
        in between. Locks and flushes must work, which network file systems do not promise.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: int | None) -> None:
        self.path = path
        self._connection = connection
        self._lock = lock
        self._file_id = _file_id(path)

    # -- opening -----------------------------------------------------------------------------------

    @classmethod
    def write(cls, path: Path, *, network: bool = False) -> Storage:
        """Open ``path`` as its only writer; a file that does not exist is made, without a row.

        Args:
            path: the file.
            network: whether a file system that is shared between machines is allowed.

        Raises:
            PrivflError: If the file cannot be opened, another run has it open, or it lies on a
                network file system.
            DamagedError: If the file is not a ledger of privfl.
        """
        kind = file_system(path)
        if kind in _NETWORK and not network:
            raise PrivflError(
                f"the ledger {path} lies on a network file system ({kind}), where two machines may "
                "write at once and a flush may not reach the disk; move it to a local disk, or "
                "write ledger: {file: PATH, network_file_system: true} in the site file"
            )
        lock = _lock(path)
        try:
            with _errors_in_one_sentence(path):
                # For its owner only, from the first moment.
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
                connection = _connect(path, "rw")
                try:
                    _prepare(path, connection)
                except BaseException:
                    connection.close()
                    raise
        except BaseException:
            os.close(lock)
            raise
        return cls(path, connection, lock)

    @classmethod
    def read(cls, path: Path) -> Storage:
        """Open ``path`` for reading; a running writer is not disturbed.

        Raises:
            PrivflError: If the file cannot be opened.
            DamagedError: If the file is not a ledger of privfl.
        """
        if not path.is_file():
            raise PrivflError(f"there is no ledger {path}")
        with _errors_in_one_sentence(path):
            try:
                # A transaction that a crash cut off is rolled back by the next reader, which needs
                # the right to write.
                connection = _connect(path, "rw")
            except sqlite3.OperationalError:
                connection = _connect(path, "ro")
            _version(path, connection)
        return cls(path, connection, None)

    # -- rows --------------------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """All rows, with their chain checked.

        Raises:
            DamagedError: If the file or the chain is damaged.
            PrivflError: If the file cannot be read.
        """
        with _errors_in_one_sentence(self.path):
            if not self._connection.execute(
                "SELECT 1 FROM sqlite_master WHERE name = 'rows'"
            ).fetchone():
                return []
            try:
                return checked(self._connection.execute(SELECT))
            except DamagedError as error:
                raise _damaged(self.path, error) from None

    def add(self, rows: list[Row]) -> None:
        """Add rows, all or none; when this returns they are on the disk.

        Raises:
            PrivflError: If the rows cannot be written, as on a full disk, or the file was changed
                or replaced meanwhile; then none was added.
            DamagedError: If SQLite finds the file damaged.
        """
        with _errors_in_one_sentence(self.path), transaction(self._connection):
            last = self._connection.execute(
                "SELECT number, hash FROM rows ORDER BY number DESC LIMIT 1"
            ).fetchone() or (0, START)
            first = rows[0]
            if (
                last[0] != first.number - 1
                or chained(last[1], first.hashed) != first.hash
                or _file_id(self.path) != self._file_id
            ):
                raise PrivflError(
                    f"the ledger {self.path} was replaced or changed while it was open; nothing "
                    "was written, look at it"
                )
            for row in rows:
                self._connection.execute(INSERT, row)

    def sound(self) -> str:
        """What SQLite's own check says of the file: 'ok', or what is wrong."""
        with _errors_in_one_sentence(self.path):
            return str(self._connection.execute("PRAGMA integrity_check(1)").fetchone()[0])

    def close(self) -> None:
        """Close the file and let others write."""
        self._connection.close()
        if self._lock is not None:
            # Closing the descriptor is not enough: a process that was forked meanwhile, as a
            # loader's worker is, has it too.
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            os.close(self._lock)
            self._lock = None


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.resolve().as_uri()}?mode={mode}",
        uri=True,
        timeout=_BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
    )
    connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return connection


def _prepare(path: Path, connection: sqlite3.Connection) -> None:
    """Make the table in an empty file, or bring the file of an older version up to date.

    Raises:
        DamagedError: If the file is another program's; it is left as it is.
        PrivflError: If a newer version wrote the file.
    """
    if connection.execute(
        "SELECT 1 FROM sqlite_master WHERE type IN ('trigger', 'view')"
    ).fetchone():
        raise DamagedError(
            f"{path} is not a ledger of privfl: it holds triggers or views; name another file"
        )
    tables = [
        name
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    ]
    new = not tables and connection.execute("PRAGMA user_version").fetchone()[0] == 0
    if not new and (
        connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION
        or "rows" not in tables
    ):
        raise DamagedError(f"{path} is not a ledger of privfl; name another file")
    version = _version(path, connection)
    connection.execute("PRAGMA journal_mode=DELETE")
    connection.execute("PRAGMA synchronous=EXTRA")
    if new:
        with transaction(connection):
            connection.execute(CREATE)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
        _flush_folder(path)
        return
    while version < VERSION:
        with transaction(connection):
            MIGRATIONS[version](connection)
            version += 1
            connection.execute(f"PRAGMA user_version = {version}")


def _version(path: Path, connection: sqlite3.Connection) -> int:
    """The format version of the file.

    Raises:
        PrivflError: If the file is newer than this program.
    """
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > VERSION:
        raise PrivflError(
            f"the ledger {path} was written by a newer privfl (format {version}); install that one"
        )
    return version


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All statements inside take effect, or none of them."""
    connection.execute("BEGIN EXCLUSIVE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def _file_id(path: Path) -> tuple[int, int] | None:
    """Which file the path names now. What is written to a file that was replaced is lost."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_dev, state.st_ino


def _flush_folder(path: Path) -> None:
    folder = os.open(path.resolve().parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _lock(path: Path) -> int:
    """The right to write, as an open descriptor of a lock file; it ends with the process,
    however that ends.

    The lock is on a file of its own, because closing any descriptor of the ledger's file would drop
    SQLite's own locks on it.

    Raises:
        PrivflError: If another writer holds the lock, or the lock file cannot be used.
    """
    target = path.resolve()  # a ledger has one lock, by whatever name it is opened
    with _errors_in_one_sentence(path):
        lock = os.open(
            target.with_name(target.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
    own = f"process {os.getpid()} on {socket.gethostname()}"
    try:
        with _errors_in_one_sentence(path):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(lock, 0)
            os.pwrite(lock, own.encode(), 0)
    except PrivflError as error:
        holder = os.pread(lock, 200, 0).decode(errors="replace")
        os.close(lock)
        if isinstance(error.__cause__, BlockingIOError):
            by = f"by another run ({holder}); wait for it to end, or give every rank its own ledger"
            if holder == own:
                by = "in this process itself: close() the object that has it open"
            raise PrivflError(f"the ledger {path} is in use {by}") from None
        raise
    return lock


def file_system(path: Path, mounts: str = "/proc/self/mountinfo") -> str:
    """The kind of file system on which ``path`` lies, or would lie; empty where the system does
    not say.

    Args:
        path: a file, which need not exist.
        mounts: the system's list of mounted file systems.
    """
    try:
        lines = Path(mounts).read_bytes().splitlines()
    except OSError:
        return ""
    folder = str(path.resolve().parent) + "/"
    best, kind = "", ""
    for line in lines:
        before, _, after = line.partition(b" - ")
        # Spaces and the like are written as octal escapes of bytes.
        mounted = os.fsdecode(
            re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), before.split()[4])
        )
        if folder.startswith(mounted.rstrip("/") + "/") and len(mounted) >= len(best):
            best, kind = mounted, os.fsdecode(after.split()[0])
    return kind.removeprefix("fuse.")


def _damaged(path: Path, what: object) -> DamagedError:
    advice = "restore a copy and check that against your run folders with `privfl budget verify`"
    return DamagedError(f"the ledger {path} is damaged: {what}; {advice}")


@contextlib.contextmanager
def _errors_in_one_sentence(path: Path) -> Iterator[None]:
    """Turn the errors of SQLite and of the system into errors of one sentence.

    Raises:
        PrivflError: If the file cannot be used.
        DamagedError: If SQLite finds the file damaged.
    """
    try:
        yield
    except (sqlite3.DatabaseError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        text = str(error)
        if isinstance(error, sqlite3.OperationalError) and (
            "locked" in text or "unable to open" in text or "readonly" in text or "disk" in text
        ):
            raise PrivflError(
                f"cannot use the ledger {path}: {text}; look at its disk and its permissions"
            ) from error
        raise _damaged(path, error) from error
    except OSError as error:
        raise PrivflError(
            f"cannot use the ledger {path}: {error.strerror}; look at its disk and its permissions"
        ) from error
