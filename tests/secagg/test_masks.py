"""What masks hide: every proper subset of contributions is uniform for key holders; and that tests
notice masks that are absent, reused, or applied at another stage.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats

from privfl.errors import ProtocolError
from privfl.secagg import Checksum, ExchangeKey, Pairs, masks
from privfl.secagg.checksum import checksum_length
from privfl.secagg.packing import pack
from tests.secagg.world import Members

LENGTH, ALARM = 40_000, 1e-6


@pytest.fixture
def vectors() -> list[np.ndarray]:
    """Far from uniform: small values, some equal."""
    return [np.random.default_rng(i).integers(-5, 6, LENGTH) + 3 * i for i in range(4)]


def uniform(integers: np.ndarray, bits: int) -> bool:
    """Chi-square over 256 bins of the highest and of the lowest 8 bits."""
    for shift in (bits - 8, 0):
        bins = np.bincount((integers >> np.uint64(shift)) & np.uint64(255), minlength=256)
        if scipy.stats.chisquare(bins).pvalue < ALARM:
            return False
    return True


def correlated(integers: np.ndarray, truth: np.ndarray, bits: int) -> bool:
    """Correlation beyond 5 standard errors, of the numbers themselves and of the values in each
    field.
    """
    x = (integers.astype(np.float64) + 0.5) / 2.0**bits
    fields = (integers & np.uint64((1 << (bits // 2)) - 1)).astype(np.float64)
    limit = 5 / np.sqrt(len(truth))
    return any(abs(np.corrcoef(read[: len(truth)], truth)[0, 1]) > limit for read in (x, fields))


def leaks(
    members: Members, contributions: list[list[np.ndarray]], vectors: list[np.ndarray]
) -> bool:
    bits = members.parameters.word_bits
    for size in range(1, len(vectors)):
        for subset in itertools.combinations(range(len(vectors)), size):
            masked_sum = members.integers([contributions[i] for i in subset], LENGTH)[: LENGTH // 2]
            truth = np.sum([vectors[i] for i in subset], axis=0)[::2].astype(np.float64)
            if not uniform(masked_sum, bits) or correlated(masked_sum, truth, bits):
                return True
    return False


def test_every_proper_subset_is_uniform_for_key_holders(vectors: list[np.ndarray]):
    members = Members(4, 16)
    contributions = members.contributions(vectors)
    assert not leaks(members, contributions, vectors)
    total = members.integers(contributions, LENGTH)[: LENGTH // 2]
    assert not uniform(total, members.parameters.word_bits), "while the sum of all is what was sent"


def test_without_masks_the_same_test_fails(
    vectors: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(masks.Masks, "apply", lambda self, integers: None)
    members = Members(4, 16)
    assert leaks(members, members.contributions(vectors), vectors)


def difference_is_uniform(members: Members, rounds: list[list[list[np.ndarray]]]) -> bool:
    """What a key holder learns from one member's contributions in two rounds."""
    one, two = (
        members.integers([contributions[0]], LENGTH)[: LENGTH // 2] for contributions in rounds
    )
    return uniform(
        (one - two) & np.uint64((1 << members.parameters.word_bits) - 1),
        members.parameters.word_bits,
    )


def test_two_rounds_of_one_member_say_nothing_together(vectors: list[np.ndarray]):
    members = Members(4, 16)
    assert difference_is_uniform(
        members, [members.contributions(vectors), members.contributions(vectors[::-1])]
    )


def test_with_masks_reused_in_two_rounds_the_same_test_fails(vectors: list[np.ndarray]):
    members = Members(4, 16)
    first = members.contributions(vectors)
    members.attempt = 0
    members.pairs = [
        Pairs(own, [other.public for other in members.exchange]) for own in members.exchange
    ]
    assert not difference_is_uniform(members, [first, members.contributions(vectors[::-1])])


def test_a_repeated_or_earlier_attempt_gets_no_masks():
    members = Members(3, 16)
    members.attempt = 5
    members.masks(0)
    for attempt in (5, 4, 1):
        with pytest.raises(
            ProtocolError,
            match=f"masks were asked for attempt {attempt} of round 1 after attempt 5 of round 1",
        ):
            members.pairs[0].masks(1, attempt, b"t")
    with pytest.raises(ProtocolError, match="of round 0"):
        members.pairs[0].masks(0, 9, b"t")
    members.pairs[0].masks(2, 1, b"t")


def masked(members: Members, number: int, transcript: bytes) -> np.ndarray:
    zeros = np.zeros(1000, dtype=np.uint64)
    members.masks(number, transcript).apply(zeros)
    return zeros


def test_masks_cancel_for_exactly_the_members_with_one_transcript():
    members = Members(3, 16)
    members.attempt = 1
    assert not np.sum([masked(members, i, b"t") for i in range(3)], axis=0, dtype=np.uint64).any()
    members.attempt = 2
    total = np.sum(
        [masked(members, i, b"u" if i == 2 else b"t") for i in range(3)], axis=0, dtype=np.uint64
    )
    assert scipy.stats.kstest(total / 2.0**64, "uniform").pvalue > ALARM
    members.attempt = 3
    two = masked(members, 0, b"t") + masked(members, 1, b"t")
    assert scipy.stats.kstest(two / 2.0**64, "uniform").pvalue > ALARM


def test_streams_go_on_where_they_stopped():
    members = Members(2, 16)
    members.attempt = 1
    whole = masked(members, 0, b"t")
    again = Pairs(members.exchange[0], [k.public for k in members.exchange]).masks(1, 1, b"t")
    pieces = [np.zeros(n, dtype=np.uint64) for n in (1, 7, 992)]
    for piece in pieces:
        again.apply(piece)
    assert np.array_equal(np.concatenate(pieces), whole)


def test_members_must_be_there_once_each():
    own, other = ExchangeKey(), ExchangeKey()
    for wrong in (
        [other.public],
        [own.public, own.public, other.public],
        [own.public, other.public, other.public],
    ):
        with pytest.raises(ProtocolError, match="exchange keys"):
            Pairs(own, wrong)
    with pytest.raises(ProtocolError, match="X25519"):
        Pairs(own, [own.public, bytes(32)]).masks(1, 1, b"t")


def test_checksums_show_a_key_holder_no_more_than_the_sum(monkeypatch: pytest.MonkeyPatch):
    """Limbs of checksums add up; where they were not blinded first, their sums show how the
    single checksums carried.
    """
    members, key = Members(2, 16), bytes(32)
    values = [np.full(10, 7.0), np.full(10, -3.0)]

    def carried(blinded: bool) -> list[bool]:
        """Per attempt: whether the sums of limbs are what the bare checksums, which a key holder
        can compute for a guess, would give.
        """
        equal = []
        for attempt in range(200):
            members.attempt = attempt + 1
            sums, guess = [
                np.zeros(checksum_length(members.parameters), dtype=np.uint64) for _ in range(2)
            ]
            for number, x in enumerate(values):
                own, bare = Checksum(key, members.parameters), Checksum(key, members.parameters)
                masks_ = members.masks(number, b"blinded" if blinded else b"bare")
                if blinded:
                    own.blind(masks_)
                for checksum in (own, bare):
                    checksum.add(x)
                sums += own.integers()
                guess += bare.integers()
            check = Checksum(key, members.parameters)
            check.add(np.sum(values, axis=0))
            assert check.fits(sums.view(np.int64))
            equal.append(np.array_equal(sums, guess))
        return equal

    assert all(carried(blinded=False))
    members.pairs = [
        Pairs(own, [other.public for other in members.exchange]) for own in members.exchange
    ]
    assert sum(carried(blinded=True)) < 60, "by chance, one in some sixteen times"


def test_every_contribution_blinds_its_checksum(monkeypatch: pytest.MonkeyPatch):
    blinded: list[int] = []
    real = masks.Masks.blinds
    monkeypatch.setattr(
        masks.Masks, "blinds", lambda self, *a: (blinded.append(1), real(self, *a))[1]
    )
    members = Members(3, 16)
    members.sum([np.ones(4, dtype=np.int64)] * 3)
    assert len(blinded) == 3


def signs_from_carries(members: Members, contributions: list[list[np.ndarray]]) -> np.ndarray:
    """What coordinator and key holder guess of the sign of the first member's integers, if words
    of c0 were masked modulo 2^64.

    Such masks cancel in the sum modulo 2^64, which is the sum of both c0 as whole numbers. The key
    holder knows u = -c1 s mod q of each member, c0 = u + m + e mod q, and the sum of the messages
    m. What is left is how often u + m passed q, and of the member whose u lies next to that edge
    the sign is then likely. 0 where nothing passed.
    """
    key, q = members.key, members.parameters.prime
    rows = [np.concatenate(blocks).reshape(-1, 8192) for blocks in contributions]
    guesses = []
    for one, two in zip(*rows, strict=True):
        visible = one[:4096].astype(np.int64) + two[:4096].astype(np.int64)
        u = []
        for row in (one, two):
            bare = row.copy()
            bare[:4096] = 0
            u.append(-key.coefficients(bare) % q)
        message = key.coefficients((one + two) % np.uint64(q))
        passed = (u[0] + u[1] + message - visible) // q
        edge = [np.where(passed > 0, q - x, x) for x in u]
        guesses.append(
            np.where(passed == 0, 0, np.where(edge[0] < edge[1], 1, -1) * np.sign(passed))
        )
    return np.concatenate(guesses)


def test_masks_on_ciphertext_words_would_leak_what_masks_on_integers_do_not(
    monkeypatch: pytest.MonkeyPatch,
):
    """Why masking comes before the encryption (docs/secure-aggregation.md): two
    members whose values add up to zero.
    """
    members = Members(2, 24)
    largest = members.parameters.largest_value
    mine = np.random.default_rng(0).integers(-largest, largest, LENGTH, endpoint=True)
    truth = np.sign(pack(mine.astype(np.float64), members.parameters).view(np.int64))

    def right(contributions: list[list[np.ndarray]]) -> tuple[int, float]:
        guesses = signs_from_carries(members, contributions)[: len(truth)]
        known = guesses != 0
        return int(known.sum()), float((guesses == truth)[known].mean())

    with_masks = right(members.contributions([mine, -mine]))
    assert abs(with_masks[1] - 0.5) < 5 * 0.5 / np.sqrt(with_masks[0])
    monkeypatch.setattr(masks.Masks, "apply", lambda self, integers: None)
    on_words = right(members.contributions([mine, -mine]))
    assert on_words[0] > 0.02 * len(truth)
    assert on_words[1] > 0.9
