"""Putting the finished model where the sites of a run share a folder and an account."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TextIO

from privfl.errors import PrivflError


def places(
    output: str | None, log: str | None, folder: str, site: str
) -> tuple[Path, Path, TextIO]:
    """(the site's folder for results, the path of its log, the log opened), made where they are
    not there yet.

    Args:
        output, log: from the site file; by default both lie in the run's ``folder``.

    Raises:
        PrivflError: If the folder or the log cannot be written.
    """
    results = Path(output or Path(folder) / "sites" / site)
    path = Path(log or results / "site.log")
    try:
        results.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        return results, path, open_log(path)
    except OSError as error:
        raise PrivflError(
            f"cannot write {error.filename}: {error.strerror}; set output and log in the site file"
        ) from error


def open_log(path: Path) -> TextIO:
    """A log to append to, line by line, readable for its owner only: it quotes what user code
    says of records.

    Raises:
        OSError: If the log cannot be written.
    """

    def owner_only(name: str, flags: int) -> int:
        return os.open(name, flags, 0o600)

    return open(
        path, "a", buffering=1, encoding="utf-8", errors="backslashreplace", opener=owner_only
    )


def share_model(model: Path, folder: Path, run: str, site: str) -> None:
    """Put ``model`` into the run folder if it is this run's here too; the first site to come
    does it, all have the same.

    Only for sites that share an account with the coordinator anyway: it owns the folder.

    Raises:
        OSError: If the folder is not shared with this site, or the model cannot be put there.
    """
    if run not in (folder / "experiment.yaml").read_text(encoding="utf-8"):
        return
    copy = folder / f".model.{site}"
    # A new file that nobody else can read, not even for a moment, and no link to another place.
    with os.fdopen(
        os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb"
    ) as file:
        file.write(model.read_bytes())
    try:
        with contextlib.suppress(FileExistsError):
            os.link(copy, folder / "model.safetensors")
    finally:
        copy.unlink()
