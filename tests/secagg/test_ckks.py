"""The encryption: exact with certainty, an error as predicted, useless to other keys, and never
on a disk.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from privfl.errors import ProtocolError
from privfl.secagg import SumKey, derive
from privfl.secagg.packing import centred
from privfl.secagg.parameters import CIPHERTEXT_WORDS, DEGREE
from privfl.secagg.seal import Memory
from tests.secagg.world import Members

P = derive(4, 20)
KEY = SumKey(P)


def encrypted(integers: np.ndarray, key: SumKey = KEY) -> np.ndarray:
    words = np.empty(CIPHERTEXT_WORDS, dtype="<u8")
    key.encrypt(integers.astype(np.uint64), words)
    return words


@pytest.mark.parametrize(("members", "bits"), [(2, 24), (4, 22), (16, 18), (64, 14), (1024, 23)])
@pytest.mark.parametrize("integer", ["least", "most", "random"])
def test_sums_of_masked_integers_are_exact_at_the_extremes(members: int, bits: int, integer: str):
    """As many ciphertexts as there are members, each of the same integer: the largest possible
    sum.
    """
    key = SumKey(derive(members, bits))
    half = 1 << (key.parameters.word_bits - 1)
    random = np.random.default_rng(0).integers(-half, half, DEGREE)
    r = {"least": np.full(DEGREE, -half), "most": np.full(DEGREE, half - 1), "random": random}[
        integer
    ]
    words = [encrypted(r.view(np.uint64), key) for _ in range(min(members, 64))]
    copies = members // len(words)
    total = np.zeros(CIPHERTEXT_WORDS, dtype=object)
    for w in words:
        total += copies * w.astype(object)
    total = (total % key.parameters.prime).astype(np.uint64)
    # Two are decrypted together, the third by itself.
    coefficients = key.coefficients(np.tile(total, 3))
    delta = 1 << key.parameters.delta_bits
    expected = np.tile(copies * len(words) * r, 3)
    assert np.array_equal(key.round(coefficients).view(np.int64), expected)
    assert np.abs(coefficients - expected * delta).max() <= 21 * members


@pytest.mark.parametrize(("members", "bits"), [(2, 16), (4, 22), (16, 18)])
def test_predicted_against_measured_error_of_the_encryption(members: int, bits: int):
    """The sum of n centred binomials of 21 pairs of bits."""
    key = SumKey(derive(members, bits))
    errors = []
    for _ in range(4):
        words = (
            np.sum(
                [encrypted(np.zeros(DEGREE), key).astype(object) for _ in range(members)], axis=0
            )
            % key.parameters.prime
        )
        errors.append(key.coefficients(words.astype(np.uint64)))
    shifted = np.concatenate(errors) + 21 * members
    expected = scipy.stats.binom(42 * members, 0.5).pmf(np.arange(42 * members + 1)) * len(shifted)
    counts = np.bincount(shifted, minlength=42 * members + 1)
    assert len(counts) == 42 * members + 1, "never beyond 21 for each ciphertext"
    often = expected >= 10
    observed = np.append(counts[often], counts[~often].sum())
    assert (
        scipy.stats.chisquare(observed, np.append(expected[often], expected[~often].sum())).pvalue
        > 1e-5
    )


def test_a_shared_key_is_the_same_key():
    copy = SumKey(P, KEY.secret_bytes())
    integers = np.arange(DEGREE)
    assert np.array_equal(copy.decrypt(encrypted(integers)), integers)
    with pytest.raises(ProtocolError, match="does not load"):
        SumKey(P, KEY.secret_bytes()[:-1])
    with pytest.raises(ProtocolError, match="does not load"):
        SumKey(derive(32, 16), KEY.secret_bytes())


def test_another_key_decrypts_noise():
    integers = np.arange(DEGREE)
    decrypted = centred(SumKey(P).decrypt(encrypted(integers)), P.word_bits)
    assert abs(np.corrcoef(decrypted, integers)[0, 1]) < 5 / np.sqrt(DEGREE)
    assert scipy.stats.kstest(decrypted / 2.0**P.word_bits + 0.5, "uniform").pvalue > 1e-5


def test_ciphertexts_differ_each_time_and_are_uniform():
    one, two = encrypted(np.zeros(DEGREE)), encrypted(np.zeros(DEGREE))
    assert (one == two).mean() < 0.01
    assert scipy.stats.kstest(np.concatenate([one, two]) / P.prime, "uniform").pvalue > 1e-5


def test_an_encryption_made_ahead_serves_once():
    """Two ciphertexts with one c1 would show the difference of what is in them to anybody."""
    key = SumKey(P)
    assert [key.encrypt_ahead(2) for _ in range(3)] == [True, True, False]
    words = [encrypted(np.arange(DEGREE) + i, key) for i in range(4)]
    assert len(np.unique(np.stack(words)[:, DEGREE:], axis=0)) == 4
    decrypted = key.decrypt(np.concatenate(words)).reshape(4, DEGREE)
    assert np.array_equal(decrypted, np.arange(DEGREE) + np.arange(4)[:, None])
    assert key.encrypt_ahead(1)


@pytest.mark.parametrize(
    "words",
    [
        np.zeros(0, dtype=np.uint64),
        np.zeros(5, dtype=np.uint64),
        np.full(CIPHERTEXT_WORDS, P.prime, dtype=np.uint64),
    ],
)
def test_words_that_are_no_ciphertext_are_refused(words: np.ndarray):
    with pytest.raises(ProtocolError, match="not below its modulus, or not of its length"):
        KEY.decrypt(words)


def test_keys_are_saved_and_loaded_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is opened by name while a key is made, shared and used: nothing but anonymous memory."""
    monkeypatch.chdir(tmp_path)
    paths: list[str] = []
    save, load = Memory.save, Memory.load
    monkeypatch.setattr(
        Memory,
        "save",
        lambda self, thing: (paths.append(os.readlink(self._path)), save(self, thing))[1],
    )
    monkeypatch.setattr(
        Memory, "load", lambda self, *a: (paths.append(os.readlink(self._path)), load(self, *a))[1]
    )
    members = Members(2, 16)
    SumKey(members.parameters, members.key.secret_bytes())
    members.sum([np.ones(5, dtype=np.int64)] * 2)
    assert len(paths) > 10
    assert all(path.startswith("/memfd:") for path in paths)
    assert not list(tmp_path.iterdir())
