"""`privfl.SecureSum`: the encrypted sum over any communicator."""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

import numpy as np
import pytest

import privfl
from privfl._rank_group import RankGroup
from privfl.errors import MismatchError, PrivflError, ProtocolError
from privfl.federation.messages import Kind, decode
from privfl.secagg import BoundedIntegers
from privfl.secagg.parameters import parameters_for
from privfl.transport import Recorded, Recording, connect
from tests.conftest import in_threads, run_job


def test_sums_refusals_and_both_paths_under_mpiexec():
    job = run_job(4, [sys.executable, "-m", "tests.jobs.secure_sum"])
    assert job.code == 0, job.err
    assert json.loads(job.out.splitlines()[-1]) == []


@pytest.mark.parametrize(("size", "bits"), [(2, 24), (3, 12), (5, 28)])
def test_in_process(size: int, bits: int):
    largest = 2 ** (bits - 1) - 1

    def part(transport: Any) -> list[np.ndarray]:
        secure = privfl.SecureSum(transport, value_bits=bits)
        vectors = [
            np.full(1000, largest),
            np.full(1000, -largest),
            np.arange(1000) * (transport.rank + 1) % largest,
        ]
        return [secure.sum(v) for v in vectors]

    for totals in in_threads(connect(size), part):
        assert (totals[0] == size * largest).all()
        assert (totals[1] == -size * largest).all()
        assert np.array_equal(
            totals[2], sum(np.arange(1000) * (r + 1) % largest for r in range(size))
        )


def test_no_vector_crosses_in_the_clear_and_no_two_sums_look_alike():
    messages: list[Recorded] = []
    lock = threading.Lock()

    def keep(recorded: Recorded) -> None:
        with lock:
            messages.append(recorded)

    secret = np.full(9000, 123456)

    def part(transport: Any) -> Any:
        secure = privfl.SecureSum(transport)
        return secure.sum(secret * (transport.rank + 1)), secure.sum(secret * (transport.rank + 1))

    for total, again in in_threads([Recording(t, keep) for t in connect(3)], part):
        assert (total == 6 * 123456).all()
        assert (again == total).all()
    sent = [r for r in messages if r.sent and decode(r.head, r.bulk).kind is Kind.CONTRIBUTION]
    assert len(sent) == 4
    words = [np.frombuffer(r.bulk, dtype="<u8") for r in sent]
    assert all((one == two).mean() < 0.01 for i, one in enumerate(words) for two in words[:i])


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_an_altered_sum_is_refused_and_ends_the_keys(wrong: int):
    """Rank ``wrong`` receives something else than the others; rank 0 cannot alter what it
    decrypts itself but by adding wrongly.
    """

    class Altering:
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def receive(self, *arguments: Any) -> Any:
            frame = self._inner.receive(*arguments)
            if frame is not None and decode(frame.head, frame.bulk).kind in (
                Kind.TOTAL,
                Kind.CONTRIBUTION,
            ):
                changed = np.frombuffer(frame.bulk, dtype="<u8").copy()
                changed[:50] = (changed[:50] + np.uint64(1 << 20)) % np.uint64(2**53)
                return type(frame)(frame.peer, frame.head, changed.tobytes())
            return frame

    def part(transport: Any) -> list[Any]:
        secure = privfl.SecureSum(transport, timeout=5)
        outcomes: list[Any] = []
        for _ in range(2):
            try:
                outcomes.append(secure.sum(np.arange(100)).tolist())
            except PrivflError as error:
                outcomes.append(error)
        return outcomes

    world = [Altering(t) if t.rank == wrong else t for t in connect(3)]
    first, second = zip(*in_threads(world, part), strict=True)
    assert isinstance(first[wrong], MismatchError)
    if wrong:
        totals = [r for n, r in enumerate(first) if n != wrong]
        assert totals == [(3 * np.arange(100)).tolist()] * 2
    # Nobody waits for a sum that this rank cannot make any more.
    assert all("not the sum of what the sites sent" in str(r) for r in second), second


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"value_bits": 40}, "between 12 and 28"),
        ({"path": "tree"}, "path star or reduce"),
        ({"range": "agreed"}, "takes a number as the public range"),
        ({"rounding": "up"}, "rounding nearest or stochastic"),
        ({"range": 0.0}, "public range of a sum must be between"),
        ({"range": float("nan")}, "public range of a sum must be between"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], sentence: str):
    results = in_threads(connect(2), lambda t: privfl.SecureSum(t, **arguments))
    assert all(isinstance(r, PrivflError) and sentence in str(r) for r in results), results


def test_one_rank_alone_has_nothing_to_hide_behind():
    (result,) = in_threads(connect(1), lambda t: privfl.SecureSum(t))
    assert isinstance(result, PrivflError)
    assert "mpiexec" in str(result)


def test_a_rank_that_does_not_come_is_an_error():
    def part(transport: Any) -> Any:
        secure = privfl.SecureSum(transport, timeout=0.5)
        return secure.sum([1, 2]) if transport.rank != 1 else None

    results = in_threads(connect(3), part)
    assert all(
        isinstance(results[r], PrivflError) and "within 0" in str(results[r]) for r in (0, 2)
    ), results


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ([[1, 2], [3]], "rank 1: no vector of numbers was given (ValueError"),
        (np.array([1 + 2j]), "rank 1: SecureSum sums integers exactly"),
        (np.zeros((2, 1), dtype=np.int64), "rank 1 has a vector of shape (2, 1)"),
    ],
)
def test_what_does_not_fit_at_one_rank_is_one_sentence_at_all_and_the_next_sum_works(
    wrong: Any, sentence: str
):
    def part(transport: Any) -> Any:
        secure = privfl.SecureSum(transport, timeout=10)
        with pytest.raises(PrivflError) as refusal:
            secure.sum(wrong if transport.rank == 1 else np.zeros((1, 2), dtype=np.int64))
        return str(refusal.value), secure.sum([1, 2]).tolist()

    for text, total in in_threads(connect(3), part):
        assert sentence in text
        assert total == [3, 6]


def test_an_argument_that_is_wrong_at_one_rank_is_one_sentence_at_all():
    def part(transport: Any) -> Any:
        return privfl.SecureSum(
            transport, value_bits=30 if transport.rank == 2 else None, timeout=10
        )

    results = in_threads(connect(3), part)
    assert all(
        isinstance(r, PrivflError) and "rank 2: value_bits must be between" in str(r)
        for r in results
    ), results


def test_a_second_contribution_to_one_attempt_is_refused():
    def part(transport: Any) -> Any:
        parameters = parameters_for(transport.size, None, "star")
        session = RankGroup(transport, timeout=10).join("", lambda: parameters)
        quantiser = BoundedIntegers(parameters)
        one = session.open(1, 1, 3, quantiser, [])
        list(one.contribution(np.array([1, 2, 3])))
        with pytest.raises(ProtocolError, match="a second contribution"):
            one.contribution(np.array([1, 2, 3]))
        with pytest.raises(ProtocolError, match="masks were asked for"):
            session.open(1, 1, 3, quantiser, [])
        return "done"

    assert in_threads(connect(2), part) == ["done"] * 2
