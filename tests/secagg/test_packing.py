"""Two values that share an integer are separated again, whatever was added."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfl.secagg import derive
from privfl.secagg.packing import centred, join, limb_count, pack, packed_length, split, unpack


@settings(deadline=None)
@given(
    st.integers(2, 64),
    st.integers(12, 28),
    st.integers(1, 9),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["random", "max", "min", "mixed"]),
)
def test_sums_of_packed_integers_are_packed_sums(
    members: int, bits: int, length: int, seed: int, kind: str
):
    p = derive(members, bits)
    random = np.random.default_rng(seed)
    largest = p.largest_value
    vectors = {
        "random": random.integers(-largest, largest, (members, length), endpoint=True),
        "max": np.full((members, length), largest),
        "min": np.full((members, length), -largest),
        "mixed": np.where(np.arange(length) % 2, largest, -largest)
        * np.ones((members, 1), dtype=np.int64),
    }[kind]
    packed = [pack(v.astype(np.float64), p) for v in vectors]
    assert all(len(x) == packed_length(length, p) for x in packed)
    total = np.sum(packed, axis=0, dtype=np.uint64)
    assert np.array_equal(unpack(total, length, p), vectors.sum(axis=0))
    # Bits above the lowest P do not matter.
    noise = random.integers(0, 1 << (64 - p.word_bits), len(total), dtype=np.uint64) << np.uint64(
        p.word_bits
    )
    assert np.array_equal(unpack(total + noise, length, p), vectors.sum(axis=0))


@pytest.mark.parametrize("bits", [1, 12, 52, 59])
def test_centred(bits: int):
    half = 1 << (bits - 1)
    integers = [0, half - 1, half, (1 << bits) - 1, 1 << bits]
    assert centred(np.array(integers, dtype=np.uint64), bits).tolist() == [
        0,
        half - 1,
        -half,
        -1,
        0,
    ]


@given(
    st.lists(st.lists(st.integers(0, 2**61 - 1), min_size=3, max_size=3), min_size=1, max_size=20),
    st.integers(5, 30),
)
def test_sums_of_limbs_are_the_limbs_of_the_sum(numbers: list[list[int]], limb_bits: int):
    count = limb_count(61, limb_bits)
    limbs = [split(np.array(row, dtype=np.uint64), limb_bits, count) for row in numbers]
    assert all((row < 1 << limb_bits).all() for row in limbs)
    assert join(np.sum(limbs, axis=0).tolist(), limb_bits, count) == [
        sum(column) for column in zip(*numbers, strict=True)
    ]
