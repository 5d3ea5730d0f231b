"""Parameters are derived, checked against the actual prime, and refused where they would not be
exact.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
from tenseal import sealapi

from privfl.errors import PrivflError
from privfl.secagg.parameters import (
    LEAST_BITS,
    MOST_BITS,
    Parameters,
    derive,
    largest_prime,
    usual_value_bits,
)
from tests.conftest import ROOT

COUNTS = [2, 3, 4, 5, 7, 8, 9, 16, 17, 32, 33, 64, 65, 100, 128, 256, 512, 1000, 1024]


def every() -> list[Parameters]:
    parameters = []
    for members, bits in itertools.product(COUNTS, range(LEAST_BITS, MOST_BITS + 1)):
        try:
            parameters.append(derive(members, bits))
        except PrivflError:
            continue
    return parameters


@pytest.mark.parametrize("bits", range(54, 61))
def test_the_primes_are_those_of_seal(bits: int):
    (prime,) = sealapi.CoeffModulus.Create(4096, [bits])
    assert prime.value() == largest_prime(bits)
    assert largest_prime(bits).bit_length() == bits


def test_every_derived_set_satisfies_the_inequality_with_whole_numbers():
    assert len(every()) > 250
    for p in every():
        n, delta = p.members, 1 << p.delta_bits
        assert delta >= 2 * 21 * n + 2
        assert delta // 2 < 2 * 21 * n + 2, "no larger than it must be"
        assert 2 * (n * 2 ** (p.word_bits - 1) * delta + 21 * n) < p.prime
        # n values of the largest size, of either sign, do not leave their field; one packed integer
        # does not leave its P bits.
        assert n * p.largest_value < 1 << (p.field_bits - 1)
        assert p.largest_value * (1 + (1 << p.field_bits) * (p.fields - 1)) < 1 << (p.word_bits - 1)
        assert p.fields == 1 or p.word_bits <= 52, "exact in float64"
        assert p.additions * p.prime <= 1 << 64


def test_two_values_share_an_integer_wherever_they_fit():
    fits = {2: 24, 4: 22, 16: 18, 64: 14, 128: 12}
    for members, most in fits.items():
        assert [derive(members, bits).fields for bits in (most, most + 1)] == [2, 1]
    assert derive(1024, 12).fields == 1


def test_mpi_can_add_wherever_an_exact_prime_allows_it():
    for p in every():
        if p.members > p.additions:
            smaller = [largest_prime(bits) for bits in range(54, p.prime.bit_length())]
            assert not any(replace(p, prime=q).exact for q in smaller), "no smaller prime is exact"
    assert all(derive(n, usual_value_bits(n)).additions >= n for n in (2, 4, 16, 32, 64, 1024))


def test_what_does_not_fit_is_refused_with_what_does():
    with pytest.raises(
        PrivflError, match="value_bits 28 do not fit a sum of 1024 members: at most 23 do"
    ):
        derive(1024, 28)
    for members, bits in ((2, 11), (2, 29)):
        with pytest.raises(PrivflError, match="between 12 and 28"):
            derive(members, bits)
    with pytest.raises(PrivflError, match="at least 2 members"):
        derive(1, 16)
    with pytest.raises(PrivflError, match="so many members do not fit"):
        derive(1 << 24, 12)


def test_a_set_that_is_not_exact_says_so():
    exact = derive(4, 22)
    assert exact.exact
    for changes in ({"members": 8}, {"value_bits": 23}, {"prime": largest_prime(58)}):
        assert not replace(exact, **changes).exact


def test_the_usual_bits_cost_nothing():
    assert [usual_value_bits(n) for n in (2, 4, 8, 16, 32, 64, 1024)] == [
        24,
        22,
        20,
        18,
        16,
        16,
        16,
    ]


def test_the_table_in_the_documents_is_what_is_derived():
    text = (ROOT / "docs" / "secure-aggregation.md").read_text()
    rows = re.findall(r"^\| (\d+) \|((?: [\d-]+(?:\*)?/?\d* \|)+)$", text, re.M)
    bits = [
        int(b) for b in re.search(r"^\| members \\ value_bits \|(.*)\|$", text, re.M)[1].split("|")
    ]
    assert len(rows) >= 8
    for members, cells in rows:
        for value_bits, cell in zip(bits, cells.strip(" |").split("|"), strict=True):
            try:
                p = derive(int(members), value_bits)
                expected = f"{p.fields}/{p.prime.bit_length()}"
            except PrivflError:
                expected = "-"
            assert cell.strip() == expected, (members, value_bits)
