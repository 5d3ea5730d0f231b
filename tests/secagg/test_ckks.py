"""Encrypted sums: right to 1e-6, without a key at the adding side, and refusing what cannot be summed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfl.errors import InternalError, PrivflError, ProtocolError
from privfl.secagg import Adder, SumKey
from privfl.secagg.ckks import BLOCK_VALUES, LARGEST_SUM, block_count

KEY = SumKey()


def opened(blocks: int, key: SumKey = KEY) -> Adder:
    adder = Adder(key.adding_context())
    adder.open(blocks)
    return adder


def encrypted_sum(vectors: list[np.ndarray], key: SumKey = KEY) -> np.ndarray:
    length = len(vectors[0])
    adder = opened(block_count(length), key)
    for vector in vectors:
        for index, block in enumerate(key.encrypt(vector, len(vectors))):
            adder.add(index, block)
    return np.concatenate(
        [key.decrypt(adder.block(i), min(BLOCK_VALUES, length - i * BLOCK_VALUES)) for i in range(block_count(length))]
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 8), st.sampled_from([1e-6, 1.0, 1000.0, "most"]), st.integers(0, 2**32 - 1))
def test_sums_are_right_to_1e_6(length: int, sites: int, scale: float | str, seed: int):
    random = np.random.default_rng(seed)
    if scale == "most":
        vectors = [np.sign(random.normal(size=length)) * LARGEST_SUM / sites for _ in range(sites)]
    else:
        vectors = [np.clip(random.normal(size=length) * scale, -LARGEST_SUM / sites, LARGEST_SUM / sites) for _ in range(sites)]
    assert np.abs(encrypted_sum(vectors) - np.sum(vectors, axis=0)).max() <= 1e-6


@pytest.mark.parametrize("length", [1, 2047, 2048, 2049, BLOCK_VALUES - 1, BLOCK_VALUES, BLOCK_VALUES + 1])
def test_every_length_around_a_limit(length: int):
    vectors = [np.random.default_rng(i).normal(size=length) for i in range(2)]
    total = encrypted_sum(vectors)
    assert total.shape == (length,)
    assert np.abs(total - vectors[0] - vectors[1]).max() <= 1e-6


def test_a_shared_key_is_the_same_key():
    copy = SumKey.from_secret_bytes(KEY.secret_bytes())
    vector = np.linspace(-5, 5, 100)
    adder = opened(1)
    adder.add(0, next(copy.encrypt(vector, 1)))
    assert np.abs(KEY.decrypt(adder.block(0), 100) - vector).max() <= 1e-6


def test_another_key_decrypts_nothing():
    vector = np.linspace(-5, 5, 2000)
    adder = opened(1)
    adder.add(0, next(KEY.encrypt(vector, 1)))
    stranger = SumKey().decrypt(adder.block(0), 2000)
    assert abs(np.corrcoef(stranger, vector)[0, 1]) < 0.15
    assert np.abs(stranger).max() > 1e3


def test_decrypted_sums_lie_on_the_grid():
    total = encrypted_sum([np.random.default_rng(0).normal(size=500)])
    assert np.array_equal(total * 2.0**24, np.rint(total * 2.0**24))


def test_the_adding_side_has_no_key_and_refuses_one():
    assert len(KEY.adding_context()) < 200
    with pytest.raises(ProtocolError, match="no secret key"):
        SumKey.from_secret_bytes(KEY.adding_context())
    with pytest.raises(InternalError, match="secret key"):
        Adder(KEY.secret_bytes())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad: float):
    with pytest.raises(PrivflError, match="NaN or infinite"):
        next(KEY.encrypt(np.array([1.0, bad]), 2))


def test_what_might_wrap_is_refused():
    next(KEY.encrypt(np.array([LARGEST_SUM / 4]), 4))
    with pytest.raises(PrivflError, match="elements beyond"):
        next(KEY.encrypt(np.array([LARGEST_SUM / 4 * 1.01]), 4))


def test_damaged_blocks_are_named_and_crash_nothing():
    block = next(KEY.encrypt(np.ones(3000), 1))
    adder = opened(1)
    random = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(block)
        match random.integers(3):
            case 0:
                damaged = damaged[: random.integers(len(damaged))]
            case 1:
                damaged[random.integers(200)] ^= 1 << int(random.integers(8))
            case _:
                damaged += bytes(random.integers(1, 50))
        try:
            KEY.decrypt(bytes(damaged), 3000)
            adder.add(0, bytes(damaged))
        except ProtocolError:
            continue


def test_contributions_of_other_lengths_are_refused():
    adder = opened(1)
    adder.add(0, next(KEY.encrypt(np.ones(100), 2)))
    with pytest.raises(ProtocolError, match="length"):
        adder.add(0, next(KEY.encrypt(np.ones(101), 2)))
    with pytest.raises(ProtocolError, match="expected 99"):
        KEY.decrypt(adder.block(0), 99)
