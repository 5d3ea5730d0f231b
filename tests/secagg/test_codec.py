"""All stages together: sums are exact for every set of parameters, and whatever is not the sum
of what was sent is refused.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from privfl.errors import MismatchError, PrivflError, ProtocolError
from privfl.identity import Identity, verify
from privfl.secagg import (
    Checksum,
    Decryption,
    EvaluatorAdder,
    Layout,
    SumKey,
    WordAdder,
    derive,
)
from privfl.secagg.adders import reduce_words
from privfl.secagg.checksum import checksum_length
from privfl.secagg.layout import BLOCK_INTEGERS
from privfl.secagg.parameters import CIPHERTEXT_WORDS
from privfl.secagg.session.keys import RunKeys
from tests.secagg.test_parameters import every
from tests.secagg.world import Members


def vectors_of(kind: str, members: Members, length: int, seed: int) -> list[np.ndarray]:
    largest, count = members.parameters.largest_value, members.parameters.members
    random = np.random.default_rng(seed)
    edges = np.array([largest, -largest, 0, 1, -1])
    return {
        "random": list(random.integers(-largest, largest, (count, length), endpoint=True)),
        "all minimum": [np.full(length, -largest)] * count,
        "all maximum": [np.full(length, largest)] * count,
        "edges": [random.choice(edges, length) for _ in range(count)],
    }[kind]


KINDS = ["random", "all minimum", "all maximum", "edges"]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 12),
    st.integers(12, 28),
    st.integers(1, 20_000),
    st.sampled_from(KINDS),
    st.integers(0, 2**32 - 1),
)
@example(64, 12, 20_000, "edges", 0)
def test_the_decoded_sum_is_the_integer_sum(
    count: int, bits: int, length: int, kind: str, seed: int
):
    members = Members(count, bits)
    vectors = vectors_of(kind, members, length, seed)
    assert np.array_equal(members.sum(vectors), np.sum(vectors, axis=0))


@pytest.mark.parametrize(
    "p", [p for p in every() if p.members <= 64], ids=lambda p: f"{p.members}x{p.value_bits}"
)
@pytest.mark.long
def test_the_decoded_sum_is_the_integer_sum_for_every_derived_set(p):
    members = Members(p.members, p.value_bits)
    for kind in KINDS:
        vectors = vectors_of(kind, members, 9000, 0)
        assert np.array_equal(members.sum(vectors), np.sum(vectors, axis=0))


@pytest.mark.parametrize(
    "length",
    [
        0,
        1,
        2,
        8191,
        8192,
        8193,
        2 * BLOCK_INTEGERS - 30,
        2 * BLOCK_INTEGERS,
        2 * BLOCK_INTEGERS + 1,
    ],
)
def test_every_length_around_a_limit(length: int):
    """Also where the checksum begins in one block and ends in the next."""
    members = Members(3, 20)
    vectors = vectors_of("random", members, length, 1)
    assert np.array_equal(members.sum(vectors), np.sum(vectors, axis=0))


@pytest.mark.long
def test_a_hundred_million_values():
    members, length = Members(2, 24), 100_000_000
    one, two = (
        np.random.default_rng(i).integers(-(2**23) + 1, 2**23, length, dtype=np.int32)
        for i in range(2)
    )
    assert np.array_equal(members.sum([one, two]), one.astype(np.int64) + two)


def test_wire_bytes_of_a_million_values():
    layout = Layout(1_000_000, derive(4, 22))
    wire = sum(layout.ciphertexts(i) * CIPHERTEXT_WORDS * 8 for i in range(layout.blocks))
    assert wire == layout.all_ciphertexts * CIPHERTEXT_WORDS * 8
    assert wire / 1_000_000 <= 8.1


# -- adding ----------------------------------------------------------------------------------------


def test_words_and_evaluator_add_to_the_same_words():
    members = Members(4, 20)
    blocks = members.contributions(vectors_of("random", members, 10_000, 2))
    by_words = members.add(blocks, 10_000)
    assert by_words == members.add(blocks, 10_000, EvaluatorAdder(members.parameters))


@pytest.mark.parametrize("bits", [54, 57, 60])
def test_words_are_reduced_before_they_wrap(bits: int):
    parameters = next(p for p in every() if p.prime.bit_length() == bits)
    layout = Layout(100, parameters)
    count = 3 * parameters.additions + 2
    block = np.full(CIPHERTEXT_WORDS * layout.ciphertexts(0), parameters.prime - 1, dtype="<u8")
    adder = WordAdder(parameters)
    adder.open(layout)
    for _ in range(count):
        adder.add(0, block.data.cast("B"))
    expected = (parameters.prime - 1) * count % parameters.prime
    assert (np.frombuffer(adder.block(0), dtype="<u8") == expected).all()


@pytest.mark.parametrize("additions", [1, 2, 3, 7, 16])
def test_reducing_sums_of_words(additions: int):
    prime = derive(16, 18).prime
    random = np.random.default_rng(additions)
    words = random.integers(0, prime, (additions, 70_000), dtype=np.uint64)
    words[:, 0], words[:, 1] = prime - 1, 0
    total = words.sum(axis=0, dtype=np.uint64)
    expected = [sum(int(w) for w in column) % prime for column in words[:, :100].T]
    reduce_words(total, prime, additions)
    assert total[:100].tolist() == expected
    assert total.max() < prime


@pytest.mark.parametrize("adder", [WordAdder, EvaluatorAdder])
def test_the_adding_side_refuses_blocks_of_other_lengths(adder: type):
    members = Members(2, 20)
    (block,), _ = members.contributions([np.zeros(100, dtype=np.int64)] * 2)
    adding = adder(members.parameters)
    adding.open(Layout(100, members.parameters))
    for index, wrong in (
        (0, block[:-1]),
        (0, np.concatenate([block, block])),
        (1, block),
        (-1, block),
        (0, block[:0]),
    ):
        with pytest.raises(ProtocolError, match="not its length"):
            adding.add(index, wrong.data.cast("B"))


# -- integrity -------------------------------------------------------------------------------------


def refused(members: Members, blocks: list[bytes], length: int) -> bool:
    try:
        members.decode(blocks, length)
    except MismatchError as error:
        # One error for all.
        return str(error) == str(MismatchError())
    return False


@pytest.mark.parametrize("bits", [20, 28])
def test_every_change_of_a_sum_is_noticed(bits: int):
    """Whoever relays a ciphertext can add any polynomial to it: single units in any element, and
    changes that cancel in a plain sum.
    """
    members, length = Members(3, bits), 9001
    contributions = members.contributions(vectors_of("random", members, length, 3))
    blocks = members.add(contributions, length)
    assert not refused(members, blocks, length)
    prime, delta = members.parameters.prime, 1 << members.parameters.delta_bits
    layout = Layout(length, members.parameters)
    changes = [
        {index: delta} for index in (0, 1, layout.packed - 1, layout.packed, layout.integers - 1)
    ]
    changes += [
        {0: prime - delta},
        {0: delta, 1: prime - delta},
        {0: delta << 20},
        {5: delta << (members.parameters.word_bits - 1)},
    ]
    for change in changes:
        words = np.frombuffer(blocks[0], dtype="<u8").copy()
        for index, amount in change.items():
            word = index // 4096 * CIPHERTEXT_WORDS + index % 4096
            words[word] = (int(words[word]) + amount % prime) % prime
        assert refused(members, [words.tobytes()], length), change
    # Multiples of the whole sum, and an encryption of zero that needs no key.
    rows = np.frombuffer(blocks[0], dtype="<u8")
    for factor in (-1, 2, 3, prime // 2):
        scaled = np.array([int(word) * factor % prime for word in rows], dtype="<u8")
        assert refused(members, [scaled.tobytes()], length), factor
    nothing = np.zeros((len(rows) // CIPHERTEXT_WORDS, CIPHERTEXT_WORDS), dtype="<u8")
    nothing[:, 4096] = 1
    assert refused(members, [nothing.tobytes()], length)
    # Subsets, repetitions, another attempt's sum, another key of the checksum.
    assert refused(members, members.add(contributions[:2], length), length)
    assert refused(members, members.add([*contributions, contributions[0]], length), length)
    members.check = os.urandom(32)
    assert refused(members, blocks, length)


def test_a_change_passes_where_the_checksum_is_not_looked_at(monkeypatch: pytest.MonkeyPatch):
    members = Members(3, 20)
    words = np.frombuffer(
        members.add(members.contributions([np.zeros(10, dtype=np.int64)] * 3), 10)[0], dtype="<u8"
    ).copy()
    words[0] = (int(words[0]) + (1 << members.parameters.delta_bits)) % members.parameters.prime
    assert refused(members, [words.tobytes()], 10)
    monkeypatch.setattr(Checksum, "fits", lambda self, sums: True)
    assert members.decode([words.tobytes()], 10).tolist() == [1] + [0] * 9


def test_a_sum_is_complete_or_nothing():
    members, length = Members(2, 20), 2 * BLOCK_INTEGERS + 10
    blocks = members.add(members.contributions(vectors_of("random", members, length, 4)), length)
    for wrong in (
        [],
        blocks[:1],
        blocks[::-1],
        [*blocks, blocks[1]],
        [blocks[0], blocks[1][:-8]],
        [blocks[0], b""],
    ):
        assert refused(members, wrong, length)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 64), st.integers(12, 28), st.integers(1, 9000), st.integers(0, 2**32 - 1))
def test_the_checksum_is_linear_and_notices_one_unit(count: int, bits: int, length: int, seed: int):
    p, key, random = derive(count, bits), os.urandom(32), np.random.default_rng(seed)
    vectors = random.integers(-p.largest_value, p.largest_value, (count, length), endpoint=True)
    limbs = np.zeros(checksum_length(p), dtype=np.int64)
    for vector in vectors:
        own = Checksum(key, p)
        own.add(vector.astype(np.float64))
        limbs += own.integers().view(np.int64)
    assert (limbs < 1 << (p.word_bits - 1)).all()
    for index, unit in ((0, 0), (int(random.integers(length)), 1)):
        total = vectors.sum(axis=0).astype(np.float64)
        total[index] += unit
        check = Checksum(key, p)
        check.add(total)
        assert check.fits(limbs) is (unit == 0)


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [1000, pytest.param(20_000, marks=pytest.mark.long)])
def test_mutated_bytes_crash_nothing(rounds: int):
    """Blocks, keys, sealed keys, notes, signatures (10^5 in all in the long
    run), at every decoder: a named error or a right answer.
    """
    members = Members(2, 20)
    blocks = members.contributions([np.ones(50, dtype=np.int64)] * 2)
    good = members.add(blocks, 50)[0]
    secret = members.key.secret_bytes()
    random = np.random.default_rng(0)

    def mutated(data: bytes) -> bytes:
        changed = bytearray(data)
        match random.integers(4):
            case 0:
                return bytes(changed[: random.integers(len(changed))])
            case 1:
                return bytes(changed) + random.bytes(int(random.integers(1, 40)))
            case 2:
                changed[random.integers(min(200, len(changed)))] ^= 1 << int(random.integers(8))
            case _:
                changed[random.integers(len(changed))] ^= 1 << int(random.integers(8))
        return bytes(changed)

    def never(_: object) -> None:
        raise AssertionError("something altered was accepted")

    adder = WordAdder(members.parameters)
    adder.open(Layout(50, members.parameters))
    outcomes = {"refused": 0, "right": 0}
    keys, exchange = RunKeys.make(members.parameters), members.exchange
    sealed = exchange[0].seal(exchange[1].public, b"secret", b"context")
    note, identity = keys.seal_note(b"note", b"context"), Identity()
    signature = identity.sign(b"message")
    for _ in range(rounds):
        # A change below Delta / 2 is rounded away as the encryption's own error is; the sum is then
        # the right one.
        try:
            assert (members.decode([mutated(good)], 50) == 2).all()
        except MismatchError:
            outcomes["refused"] += 1
        else:
            outcomes["right"] += 1
        for attempt in (
            lambda: adder.add(0, mutated(good)),
            lambda: SumKey(members.parameters, mutated(secret)),
            lambda: RunKeys.from_secret_bytes(mutated(keys.secret_bytes()), members.parameters),
            lambda: never(exchange[1].open(exchange[0].public, mutated(sealed), b"context")),
            lambda: never(keys.open_note(mutated(note), b"context")),
            lambda: never(verify(identity.public, mutated(signature), b"message")),
        ):
            try:
                attempt()
            except ProtocolError:
                continue
    assert min(outcomes.values()) > rounds / 50


def test_decryption_takes_no_more_than_its_blocks():
    members = Members(2, 20)
    block = members.add(members.contributions([np.ones(5, dtype=np.int64)] * 2), 5)[0]
    decryption = Decryption(5, Checksum(members.check, members.parameters), members.key)
    decryption.add(block)
    with pytest.raises(MismatchError):
        decryption.add(block)
    with pytest.raises(PrivflError):
        Decryption(5, Checksum(members.check, members.parameters), members.key).totals()
