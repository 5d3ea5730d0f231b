"""A ledger that the disk, or a hand, has changed: it is found damaged, or what it says is the
same.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfl.accounting import ACCOUNTS
from privfl.errors import DamagedError, PrivflError
from privfl.ledger import Ledger
from privfl.ledger.rows import chained
from tests.ledger.ledgers import RUN, STEP, a_dozen_rows, by_sql, open_ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    a_dozen_rows(tmp_path / "north.ledger").close()
    return tmp_path / "north.ledger"


def flipped(path: Path, offsets: Iterable[int], seed: int) -> tuple[int, int]:
    """Flip a random bit of each byte in turn, in a fresh copy each; how often that was found,
    and how often it changed nothing.
    """
    with Ledger.read(path) as ledger:
        rows, spent, filters = (
            ledger.rows,
            [ledger.spent(account) for account in ACCOUNTS],
            ledger.filters,
        )
    good, copy, rng = path.read_bytes(), path.with_name("copy.ledger"), random.Random(seed)
    detected = unchanged = 0
    for offset in offsets:
        bad = bytearray(good)
        bad[offset] ^= 1 << rng.randrange(8)
        copy.write_bytes(bad)
        try:
            with Ledger.read(copy) as ledger:
                assert ledger.rows == rows, offset
                assert ledger.filters == filters, offset
                for account, expected in zip(ACCOUNTS, spent, strict=True):
                    np.testing.assert_array_equal(ledger.spent(account), expected)
                # Whatever this says, it says it.
                ledger.problems()
            unchanged += 1
        except PrivflError:
            detected += 1
    return detected, unchanged


@pytest.mark.slow
def test_a_flipped_bit_is_found_or_changes_nothing(path: Path):
    size = path.stat().st_size
    # The header, and bytes anywhere.
    offsets = [*range(0, 110, 2), *random.Random(2).sample(range(size), 300)]
    detected, unchanged = flipped(path, offsets, seed=3)
    assert detected > 100
    assert unchanged > 50


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_flipped_bit_in_every_byte_is_found_or_changes_nothing(path: Path):
    detected, unchanged = flipped(path, range(path.stat().st_size), seed=4)
    # All that is stored of the rows must be found: the larger part is text of the bodies.
    with Ledger.read(path) as ledger:
        stored = sum(len(str(value)) for row in ledger.rows for value in row)
    assert detected > 0.95 * stored
    assert unchanged > 1000


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_every_bit_of_the_header(path: Path):
    for seed in range(20):
        flipped(path, range(120), seed)


@pytest.mark.parametrize("size", [0, 1, 99, 100, 4095, 4096, 4097, 8192, 12_288, 16_384, -1])
def test_a_file_that_was_cut_is_found(path: Path, size: int):
    good = path.read_bytes()
    path.write_bytes(good[:size])
    with pytest.raises(PrivflError):
        Ledger.read(path)


@pytest.mark.parametrize("page", range(5))
def test_a_page_of_zeros_is_found_or_changes_nothing(path: Path, page: int):
    with Ledger.read(path) as ledger:
        rows = ledger.rows
    bad = bytearray(path.read_bytes())
    bad[page * 4096 : (page + 1) * 4096] = bytes(4096)
    path.write_bytes(bad)
    try:
        with Ledger.read(path) as ledger:
            assert ledger.rows == rows
    except PrivflError:
        pass


# -- stored values ---------------------------------------------------------------------------------


def texts_near(text: str) -> Iterable[str]:
    """Other texts for a column of text: none of them may pass."""
    yield text + " "
    yield text + "x"
    if text:
        yield text[:-1]
        yield text.swapcase() if text.swapcase() != text else text[::-1] + "|"
        yield ""
    else:
        yield "0"


def others(name: str, value: Any) -> Iterable[Any]:
    """Other values of the same type for a column."""
    if isinstance(value, int):
        yield from (value + 1, value - 1, value + 256, -value if value else 2**40)
    elif name == "kind":
        yield from ({"opened", "run", "mechanism", "charge", "refund", "migrated"} - {value})
    elif name == "account":
        yield from ({"training", "evaluation", "", "both"} - {value})
    elif name == "hash":
        yield from ("0" * 64, value.upper() if value.upper() != value else "", value[1:] + value[0])
    else:
        yield from texts_near(value)


def assert_damaged(path: Path, what: object) -> None:
    said = f"not found: {what}"
    with contextlib.suppress(DamagedError), Ledger.read(path):
        pytest.fail(said)
    with pytest.raises(
        DamagedError, match=r"^the ledger [^\n]* is damaged: [^\n]*; restore a copy"
    ):
        Ledger.read(path)


def test_every_changed_column_of_every_row_is_found(path: Path):
    good = path.read_bytes()
    with Ledger.read(path) as ledger:
        rows = ledger.rows
    tried = 0
    for row in rows:
        for name, value in row._asdict().items():
            for other in others(name, value):
                # A number that is taken already cannot be given by SQL.
                if name == "number" and 1 <= other <= len(rows):
                    continue
                path.write_bytes(good)
                by_sql(path, (f"UPDATE rows SET {name} = ? WHERE number = ?", (other, row.number)))
                assert_damaged(path, (row.number, name, other))
                tried += 1
    assert tried > 400


def test_every_changed_number_of_a_mechanism_and_of_the_limits_is_found(path: Path):
    good = path.read_bytes()
    with Ledger.read(path) as ledger:
        bodies = {
            row.number: row.body for row in ledger.rows if row.kind in ("opened", "mechanism")
        }
    assert sorted(bodies) == [1, 3, 5, 9]
    for number, body in bodies.items():
        # Every digit in turn, of a sample of them: exponents, signs and the last place of a double
        # are among them.
        digits = [offset for offset, character in enumerate(body) if character.isdigit()]
        for offset in random.Random(number).sample(digits, 60):
            other = body[:offset] + str((int(body[offset]) + 1) % 10) + body[offset + 1 :]
            path.write_bytes(good)
            by_sql(path, ("UPDATE rows SET body = ? WHERE number = ?", (other, number)))
            assert_damaged(path, (number, offset))


@pytest.mark.parametrize(
    "statements",
    [
        ["DELETE FROM rows WHERE number = 5"],
        ["DELETE FROM rows WHERE number = 1"],
        [
            "DELETE FROM rows WHERE number = 5",
            "UPDATE rows SET number = number - 1 WHERE number > 5",
        ],
        [
            "UPDATE rows SET number = 100 WHERE number = 11",
            "UPDATE rows SET number = 11 WHERE number = 12",
        ],
        [
            "UPDATE rows SET number = -number WHERE number IN (7, 8)",
            "UPDATE rows SET number = 15 + number WHERE number < 0",
        ],
        [
            "INSERT INTO rows SELECT 13, time, kind, run, round, account, mechanism, steps, body, "
            "hash FROM rows WHERE number = 8"
        ],
        [
            "INSERT INTO rows SELECT 0, time, kind, run, round, account, mechanism, steps, body, "
            "hash FROM rows WHERE number = 8"
        ],
        [
            "INSERT INTO rows SELECT 14, time, kind, run, round, account, mechanism, steps, body, "
            "hash FROM rows WHERE number = 8"
        ],
        ["ALTER TABLE rows RENAME COLUMN body TO corpse"],
        ["ALTER TABLE rows DROP COLUMN body"],
        ["UPDATE rows SET run = x'6162' || run WHERE number = 4"],
    ],
)
def test_rows_taken_out_put_in_and_moved_are_found(path: Path, statements: list[str]):
    by_sql(path, *statements)
    assert_damaged(path, statements)


def test_a_ledger_without_its_table_is_no_ledger(path: Path):
    by_sql(path, "ALTER TABLE rows RENAME TO lines")
    for opened in (lambda: Ledger.read(path), lambda: Ledger.write(path, "north", {})):
        with pytest.raises(PrivflError, match=r"holds nothing yet|is not a ledger"):
            opened()


def test_a_row_with_a_hash_of_its_own_breaks_the_next(path: Path):
    with Ledger.read(path) as ledger:
        rows = ledger.rows
    forged = rows[9]._replace(steps=1)
    by_sql(
        path,
        (
            "UPDATE rows SET steps = 1, hash = ? WHERE number = 10",
            (chained(rows[8].hash, tuple(forged[:9])),),
        ),
    )
    with pytest.raises(DamagedError, match="row 11 was changed"):
        Ledger.read(path)


def test_a_row_of_another_history_does_not_fit(path: Path):
    """Two copies of one ledger that went on apart, as after a backup: rows of one are no rows of
    the other.
    """
    other = path.with_name("other.ledger")
    other.write_bytes(path.read_bytes())
    for copy, steps in ((path, 5), (other, 1)):
        with open_ledger(copy) as ledger:
            ledger.charge("training", STEP.times(steps), RUN, 4)
            ledger.charge("training", STEP.times(2), RUN, 5)
            last = ledger.rows[-1]
    by_sql(path, ("UPDATE rows SET time = ?, hash = ? WHERE number = 14", (last.time, last.hash)))
    with pytest.raises(DamagedError, match="row 14 was changed"):
        Ledger.read(path)
