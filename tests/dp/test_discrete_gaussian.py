"""Samples of the discrete Gaussian against its exact probabilities, the tables they come from,
and where the bits come from.
"""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from scipy import stats

from privfl.noise import discrete_gaussian, randomness
from privfl.noise.discrete_gaussian import DiscreteGaussian
from privfl.noise.distributed import _LEAST_DEVIATION
from privfl.noise.randomness import SeededRandomness, SystemRandomness

# Of tests that compare what is random with what is exact: they fail by chance once in ten million.
RARE = 1e-7
# All shapes of the tables: bins of one integer, the first of two, the edges of powers of two, the
# widest.
DEVIATIONS = [0.5, 0.51, 3.0, 31.999, 32.0, 1e4, 2.0**24 + 0.3, 2.0**40]


def exact(deviation: float, reach: int) -> NDArray[np.float64]:
    """The probabilities of -reach .. reach."""
    with mpmath.workdps(40):
        # exp(-(x + 1)^2 c) is exp(-x^2 c) times exp(-(2 x + 1) c), and that falls by exp(-2 c) in
        # every step.
        step = mpmath.exp(-1 / mpmath.mpf(deviation) ** 2)
        half, ratio = [mpmath.mpf(1)], mpmath.sqrt(step)
        for _ in range(reach):
            half.append(half[-1] * ratio)
            ratio *= step
        total = half[0] + 2 * mpmath.fsum(half[1:])
        return np.array([float(h / total) for h in half[:0:-1] + half])


def chi_square(
    samples: NDArray[np.int64], probabilities: NDArray[np.float64], cell: int = 1
) -> float:
    """The p-value of samples whose exact probabilities at -reach ..

    reach are given, in cells of ``cell`` integers.
    """
    reach = len(probabilities) // 2
    assert np.abs(samples).max() <= reach
    starts = np.arange(0, len(probabilities), cell)
    counts = np.add.reduceat(np.bincount(samples + reach, minlength=len(probabilities)), starts)
    expected = np.add.reduceat(probabilities, starts) * len(samples)
    # The tails together, so that every cell has ten or more.
    inner = np.flatnonzero(expected >= 10.0)
    first, last = inner[0], inner[-1] + 1
    counts = [counts[:first].sum(), *counts[first:last], counts[last:].sum()]
    expected = [expected[:first].sum(), *expected[first:last], expected[last:].sum()]
    # A tail in which hardly anything is expected joins its neighbour.
    for end, neighbour in ((0, 1), (-1, -2)):
        counts[neighbour], expected[neighbour] = (
            counts[neighbour] + counts[end],
            expected[neighbour] + expected[end],
        )
    return float(
        stats.chisquare(
            counts[1:-1], np.array(expected[1:-1]) / np.sum(expected[1:-1]) * len(samples)
        ).pvalue
    )


def convolution_distance(deviation: float, members: int) -> mpmath.mpf:
    """At most how far the log-probabilities of a sum of ``members`` samples are from those of a
    discrete Gaussian of variance members deviation^2.

    Kairouz, Liu, Steinke 2021, arXiv 2102.06387; for a deviation of at least 1/2.
    """
    square = 2 * (mpmath.pi * deviation) ** 2
    return 10 * mpmath.fsum(mpmath.exp(-square * k / (k + 1)) for k in range(1, members))


# -- what comes out --------------------------------------------------------------------------------


@pytest.mark.parametrize(("deviation", "cell"), [(0.7, 1), (3.0, 1), (50.0, 1), (1e4, 37)])
def test_samples_have_the_exact_probabilities(deviation: float, cell: int):
    samples = DiscreteGaussian(deviation, SystemRandomness()).draw(2_000_000)
    assert samples.shape == (2_000_000,)
    assert samples.dtype == np.int64
    assert chi_square(samples, exact(deviation, math.ceil(8 * deviation)), cell) > RARE


def test_positions_within_a_bin_have_the_exact_probabilities():
    """At a deviation of 10^4 a bin is 512 wide; what all samples are modulo that is uniform but
    for less than 10^-1000.
    """
    noise = DiscreteGaussian(1e4, SystemRandomness())
    assert noise.starts[1] - noise.starts[0] == 512
    for modulus in (512, 7):
        counts = np.bincount(noise.draw(1_000_000) % modulus, minlength=modulus)
        assert stats.chisquare(counts).pvalue > RARE


@pytest.mark.parametrize("deviation", [2.0**20, 2.0**24 + 0.5, 2.0**40])
def test_moments_of_wide_noise(deviation: float):
    count = 2_000_000
    scaled = DiscreteGaussian(deviation, SystemRandomness()).draw(count) / deviation
    # Standard errors of the first four moments of the normal distribution, from which this one is
    # not to be told.
    for power, moment, error in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs((scaled**power).mean() - moment) < 5.5 * math.sqrt(error / count), power
    assert stats.kstest(scaled[:500_000], stats.norm.cdf).pvalue > RARE


@pytest.mark.slow
def test_tails_appear_as_often_as_they_should():
    """Beyond 5 deviations lies one sample in 1.7 million."""
    noise = DiscreteGaussian(1000.0, SystemRandomness())
    beyond, pieces, limits = np.zeros(2, dtype=int), 10, (4000, 5000)
    for _ in range(pieces):
        samples = np.abs(noise.draw(4_000_000))
        beyond += [np.count_nonzero(samples > limit) for limit in limits]
    probabilities = exact(1000.0, 12_000)
    for count, limit in zip(beyond.tolist(), limits, strict=True):
        expected = stats.poisson(pieces * 4_000_000 * 2 * probabilities[12_000 + limit + 1 :].sum())
        assert expected.ppf(RARE) <= count <= expected.isf(RARE), limit


@pytest.mark.parametrize("count", [0, 1, 2, 1000, (1 << 14) + 1, 100_000])
def test_as_many_as_were_asked_for(count: int):
    assert len(DiscreteGaussian(50.0, SystemRandomness()).draw(count)) == count


def test_a_draw_is_the_accepted_candidates_in_their_order():
    """None twice, none left out: a choice among them would need to know them."""
    drawn, pieces = (DiscreteGaussian(1e4, SeededRandomness(4, "a")) for _ in range(2))
    accepted = np.concatenate([pieces._candidates(discrete_gaussian._PIECE) for _ in range(2)])
    samples = drawn.draw(3 * discrete_gaussian._PIECE)
    assert np.array_equal(samples[: len(accepted)], accepted)


@pytest.mark.parametrize("deviation", [0.0, -1.0, 0.49, 2.0**40 * 1.01, math.inf, math.nan])
def test_deviations_out_of_range_are_refused(deviation: float):
    with pytest.raises(ValueError, match="deviation"):
        DiscreteGaussian(deviation, SystemRandomness())


# -- the tables ------------------------------------------------------------------------------------


@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_the_table_gives_every_bin_exactly_its_weight(deviation: float):
    noise = DiscreteGaussian(deviation, SystemRandomness())
    full, columns = 1 << 54, 1024
    implied = [0] * len(noise.weights)
    for column, own in enumerate(noise._thresholds.tolist()):
        assert 0 <= own <= full
        implied[noise._bins[column]] += own
        implied[noise._bins[columns + column]] += full - own
    assert implied == noise.weights
    assert sum(implied) == columns * full
    assert min(implied) > 0
    assert noise._offsets.tolist() == [noise.starts[i] for i in noise._bins]


def test_the_threshold_of_a_column_is_the_first_that_is_not_its_own():
    noise = DiscreteGaussian(1e4, SystemRandomness())
    for column in np.flatnonzero((noise._thresholds > 0) & (noise._thresholds < 1 << 54))[
        :50
    ].tolist():
        own = int(noise._thresholds[column])
        for rest, entry in (
            (0, column),
            (own - 1, column),
            (own, 1024 + column),
            ((1 << 54) - 1, 1024 + column),
        ):
            noise._randomness = _Given(column << 54 | rest)
            assert noise._candidates(1).tolist() == [int(noise._offsets[entry])]


@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_the_staircase_covers_the_range_and_lies_above_the_curve(deviation: float):
    noise = DiscreteGaussian(deviation, SystemRandomness())
    width = 1 << noise._bits
    assert width == 1 or 16 <= deviation / width < 32
    assert noise.starts == list(range(noise.starts[0], -noise.starts[0], width))
    assert -noise.starts[0] >= 12.0 * deviation
    # The bits of the position and those of the acceptance do not overlap.
    assert noise._bits + noise._fine_bits <= 64
    accepted = mpmath.mpf(0)
    with mpmath.workdps(60):
        for start, weight in zip(noise.starts, noise.weights, strict=True):
            ends = [
                mpmath.exp(-(mpmath.mpf(x) ** 2) / (2 * mpmath.mpf(deviation) ** 2))
                for x in (start, start + width - 1)
            ]
            # Monotone within a bin, as none has integers of both signs.
            assert start >= 0 or start + width - 1 < 0
            assert noise.scale * max(ends) < weight
            accepted += noise.scale * min(ends)
        assert accepted / (1 << 64) > 0.9


@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_the_float_of_the_acceptance_is_within_its_bound(deviation: float):
    """Integers everywhere in bins everywhere; the proof says below 2^-43, the sampler relies on
    2^-40.
    """
    noise = DiscreteGaussian(deviation, SystemRandomness())
    generator = np.random.default_rng(1)
    # A row of the table for each bin.
    entries = np.array(
        [int(np.flatnonzero(noise._bins == i)[0]) for i in range(len(noise.weights))]
    )
    entries = np.concatenate([entries, entries])
    x = noise._offsets[entries] + generator.integers(0, 1 << noise._bits, len(entries))
    chances = noise._chances(x, entries)
    with mpmath.workdps(60):
        for value, entry, chance in zip(
            x.tolist(), entries.tolist(), chances.tolist(), strict=True
        ):
            height = mpmath.exp(-(mpmath.mpf(value) ** 2) / (2 * mpmath.mpf(deviation) ** 2))
            assert abs(noise.scale * height / noise.weights[noise._bins[entry]] - chance) < 2.0**-43
    assert noise._tolerance >= 2.0**-40 + 2.0**-noise._fine_bits


# -- where the float does not decide ---------------------------------------------------------------


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch):
    """Bins as wide as the deviation, so that the acceptance has much to do."""
    monkeypatch.setattr(discrete_gaussian, "_FINENESS", 0.75)


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("undecided", [False, True])
def test_a_coarse_staircase_gives_the_same_distribution(undecided: bool):
    noise = DiscreteGaussian(3.0, SystemRandomness())
    assert noise.starts[1] - noise.starts[0] == 4
    if undecided:
        noise._tolerance = 2.0
    samples = noise.draw(8_000 if undecided else 1_000_000)
    assert chi_square(samples, exact(3.0, 40)) > RARE


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("deviation", [0.7, 3.0, 1e4, 2.0**36])
def test_float_and_exact_arithmetic_decide_alike(deviation: float):
    """The same candidates, once by floats and once all by 128 more bits: they differ for one in
    2^24 at most.
    """
    by_floats, exactly = (DiscreteGaussian(deviation, SeededRandomness(3, "a")) for _ in range(2))
    exactly._tolerance = 2.0
    assert np.array_equal(by_floats._candidates(1500), exactly._candidates(1500))


class _Given:
    """Bytes that are given beforehand."""

    private = False

    def __init__(self, value: int) -> None:
        self._value = value

    def bytes(self, count: int) -> bytes:
        return self._value.to_bytes(count, "little")


@pytest.mark.parametrize("deviation", [50.0, 1e4, 2.0**24 + 0.5])
def test_the_last_of_128_bits_decides(deviation: float):
    noise = DiscreteGaussian(deviation, _Given(0))
    bin_of_x = len(noise.weights) // 2 + 20
    x = noise.starts[bin_of_x] + (1 << noise._bits) - 1
    with mpmath.workdps(90):
        chance = (
            noise.scale
            * mpmath.exp(-(mpmath.mpf(x) ** 2) / (2 * mpmath.mpf(deviation) ** 2))
            / noise.weights[bin_of_x]
        )
        boundary = int(mpmath.floor(chance * 2 ** (noise._fine_bits + 128)))
    first, rest = divmod(boundary, 1 << 128)
    assert 0 < rest < (1 << 128) - 1
    for more, expected in ((rest, True), (rest + 1, False)):
        noise._randomness = _Given(more)
        assert noise._accepts(x, bin_of_x, first) is expected


@pytest.mark.parametrize(
    ("units", "errors", "expected"),
    [
        # a(x) as the float has it, from the first bits in their units, plus so many float errors.
        (0.5, 0.0, "asks"),
        (0.0, -0.9, "asks"),
        (1.0, 0.9, "asks"),
        (1.0, 1.1, "accepts"),
        (-1.0, -1.1, "rejects"),
    ],
)
@pytest.mark.parametrize("deviation", [1e4, 2.0**30])
def test_floats_decide_only_where_their_error_cannot_matter(
    deviation: float, units: float, errors: float, expected: str, monkeypatch: pytest.MonkeyPatch
):
    noise = DiscreteGaussian(deviation, SystemRandomness())
    first = 1 << (noise._fine_bits - 1)
    noise._randomness = _Given(first << (128 - noise._fine_bits))
    chance = 0.5 + units * 2.0**-noise._fine_bits + errors * 2.0**-40
    asked = []
    monkeypatch.setattr(noise, "_chances", lambda x, entry: np.array([chance]))
    monkeypatch.setattr(noise, "_accepts", lambda *arguments: asked.append(arguments) or True)
    accepted = noise._candidates(1).tolist()
    x, bin_of_x = (
        int(noise._offsets[0 if noise._thresholds[0] > 0 else 1024]),
        int(noise._bins[0 if noise._thresholds[0] > 0 else 1024]),
    )
    assert asked == ([(x, bin_of_x, first)] if expected == "asks" else [])
    assert accepted == ([] if expected == "rejects" else [x])


# -- sums of shares --------------------------------------------------------------------------------


def test_the_sum_of_shares_is_a_discrete_gaussian_of_their_variance():
    sources = [DiscreteGaussian(3.0, SystemRandomness()) for _ in range(5)]
    total = sum(source.draw(1_000_000) for source in sources)
    assert chi_square(total, exact(math.sqrt(5 * 9.0), 60)) > RARE


@pytest.mark.parametrize("members", [2, 3, 5])
@pytest.mark.parametrize("deviation", [0.5, 0.6, 0.8, 1.0])
def test_the_convolution_bound_holds(deviation: float, members: int):
    """By convolution of exact probabilities; for two members it is 5 times what it bounds."""
    with mpmath.workdps(50):
        reach = 16

        def of(variance: mpmath.mpf, last: int) -> list[mpmath.mpf]:
            half = [mpmath.exp(-(mpmath.mpf(x) ** 2) / (2 * variance)) for x in range(last + 1)]
            total = half[0] + 2 * mpmath.fsum(half[1:])
            return [h / total for h in half[:0:-1] + half]

        one = of(mpmath.mpf(deviation) ** 2, reach)
        total = one
        for _ in range(members - 1):
            sums = [mpmath.mpf(0)] * (len(total) + 2 * reach)
            for i, a in enumerate(total):
                for j, b in enumerate(one):
                    sums[i + j] += a * b
            total = sums
        middle = len(total) // 2
        ideal = of(members * mpmath.mpf(deviation) ** 2, middle)
        # Where the truncation of a member is not felt.
        distance = max(abs(mpmath.log(total[i] / ideal[i])) for i in range(middle - 8, middle + 9))
        assert distance <= convolution_distance(deviation, members)
        if members == 2:
            assert convolution_distance(deviation, members) < 5.01 * distance


def test_shares_that_are_not_refused_add_up_to_discrete_gaussian_noise():
    """For sums of d coordinates the distance counts 2 d times in epsilon: below 10^-260 for d =
    10^9.
    """
    assert convolution_distance(_LEAST_DEVIATION, 128) < mpmath.mpf(10) ** -270


# -- the bits --------------------------------------------------------------------------------------


def test_two_instances_and_two_processes_differ():
    code = (
        "from privfl.noise.randomness import SystemRandomness as R; from "
        "privfl.noise.discrete_gaussian import DiscreteGaussian as D\n"
        "print(*[D(1e6, R()).draw(20).tolist() for _ in range(2)], sep='\\n')"
    )
    run = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    lines = [line for out in run for line in out.splitlines()]
    assert len(lines) == len(set(lines)) == 4


def test_a_source_needs_no_torch_and_neither_does_the_noise():
    code = (
        "import sys, privfl.noise.discrete_gaussian, privfl.noise.randomness; sys.exit('torch' in "
        "sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _in_child(source: SystemRandomness, fork: Callable[[], int]) -> bytes:
    """The next 32 bytes in a child process."""
    reader, writer = os.pipe()
    child = fork()
    if child == 0:
        os.write(writer, source.bytes(32))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        drawn = pipe.read()
    os.waitpid(child, 0)
    return drawn


@pytest.mark.parametrize("how", ["python", "unseen by python", "number met again"])
def test_a_forked_child_does_not_repeat_its_parent(how: str, monkeypatch: pytest.MonkeyPatch):
    source = SystemRandomness()
    source.bytes(10)
    if how == "number met again":
        monkeypatch.setattr(os, "getpid", lambda: 12345)
        source.bytes(10)
    child = _in_child(source, ctypes.PyDLL(None).fork if how == "unseen by python" else os.fork)
    parent = source.bytes(32)
    assert len(child) == len(parent) == 32
    assert child != parent


def test_every_key_comes_from_the_system_and_serves_for_so_much(monkeypatch: pytest.MonkeyPatch):
    keys: list[bytes] = []

    def urandom(count: int) -> bytes:
        keys.append(bytes([len(keys)]) * count)
        return keys[-1]

    monkeypatch.setattr(randomness, "_KEY_BYTES", 1000)
    monkeypatch.setattr(os, "urandom", urandom)
    source = SystemRandomness()
    drawn = b"".join(source.bytes(count) for count in (7, 100, 0, 1500, 1393))
    assert [len(key) for key in keys] == [32, 32, 32]
    expected = [
        Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(1000))
        for key in keys
    ]
    assert drawn == b"".join(expected)


def test_many_bytes_at_once():
    drawn = SystemRandomness().bytes(randomness._KEY_BYTES + (3 << 19) + 5)
    assert len(drawn) == randomness._KEY_BYTES + (3 << 19) + 5
    counts = np.bincount(np.frombuffer(drawn, dtype=np.uint8), minlength=256)
    assert stats.chisquare(counts).pvalue > RARE
    blocks = np.frombuffer(drawn[: len(drawn) // 16 * 16], dtype="V16")
    assert len(np.unique(blocks)) == len(blocks)
