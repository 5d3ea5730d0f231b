"""A site's part in a sum: what all members must agree on, numbers that take several
values, and the end of the keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from privfl.errors import MismatchError, PrivflError, ProtocolError
from privfl.identity import Identity
from privfl.secagg import BoundedIntegers, ExchangeKey, WordAdder, derive
from privfl.secagg.packing import join
from privfl.secagg.parameters import parameters_for
from privfl.secagg.session.keys import RunKeys, open_keys, seal_keys
from privfl.secagg.session.metrics import layout_of, metrics_from_totals, metrics_to_integers
from privfl.secagg.session.range import agreed_range, seal_exponent
from privfl.secagg.session.roster import Member, Roster
from privfl.secagg.session.sums import SumAttempt, SumSession

SITES = ("a", "b", "c")
P = derive(3, 20)


@pytest.fixture
def sums() -> list[SumSession]:
    exchange = [ExchangeKey() for _ in SITES]
    members = [
        Member(site, key.public, Identity().public)
        for site, key in zip(SITES, exchange, strict=True)
    ]
    roster = Roster.of("run", "digest", P, members)
    keys = RunKeys.make(P)
    sealed = dict(seal_keys(keys, exchange[0], roster))
    others = [open_keys(sealed[i], exchange[i], roster, SITES[i], P) for i in (1, 2)]
    return [SumSession(roster, own, k) for own, k in zip(exchange, [keys, *others], strict=True)]


def total(opened: list[SumAttempt], contributions: list[Any], layout: Any) -> list[np.ndarray]:
    adder = WordAdder(P)
    adder.open(layout)
    for blocks in contributions:
        for index, block in enumerate(blocks):
            adder.add(index, block.data.cast("B"))
    for one in opened:
        for index in range(layout.blocks):
            one.collect(bytes(adder.block(index)))
    return [one.total() for one in opened]


def open_all(
    sums: list[SumSession], length: int, facts: list[Any], round_: int = 1
) -> list[SumAttempt]:
    return [
        s.open(round_, 1, length, BoundedIntegers(P), f) for s, f in zip(sums, facts, strict=True)
    ]


def test_sites_that_agree_get_the_sum(sums: list[SumSession]):
    opened = open_all(sums, 5, [["update", 1.0]] * 3)
    vectors = [np.arange(5) * k for k in (1, -7, 100)]
    contributions = [one.contribution(v) for one, v in zip(opened, vectors, strict=True)]
    for decoded in total(opened, contributions, layout_of(5, P, wide=False)):
        assert np.array_equal(decoded, np.sum(vectors, axis=0))


@pytest.mark.parametrize(
    "different", [["metrics", 1.0], ["update", 2.0], ["update", 1.0, {"records": {"a": 2}}]]
)
def test_sites_that_disagree_do_not_decode_and_give_the_keys_up(
    sums: list[SumSession], different: list[Any]
):
    opened = open_all(sums, 5, [["update", 1.0], ["update", 1.0], different])
    contributions = [one.contribution(np.ones(5, dtype=np.int64)) for one in opened]
    with pytest.raises(MismatchError):
        total(opened, contributions, layout_of(5, P, wide=False))
    assert sums[0].given_up
    with pytest.raises(MismatchError):
        sums[0].open(2, 1, 5, BoundedIntegers(P), ["update", 1.0])


def test_a_reduction_is_refused_where_words_of_all_members_do_not_add_in_64_bits():
    assert parameters_for(128, 12, "star").additions < 128
    with pytest.raises(
        PrivflError,
        match=(
            r"path reduce adds at most \d+ contributions at value_bits 12, there are 128; lower "
            r"value_bits, or"
        ),
    ):
        parameters_for(128, 12, "reduce")
    assert parameters_for(64, None, "reduce").value_bits == 16


NUMBERS = [
    np.array([0.1, -5.5, 3e8, 0.0]),
    np.array([1e-9, 5.5, -3e8, -0.25]),
    np.array([90.0, 2.0**29, 1.0, 0.125]),
]


def test_wide_numbers_are_summed_to_a_billionth(sums: list[SumSession]):
    layout = layout_of(4, P, wide=True)
    opened = open_all(sums, layout.values, [["metrics", None]] * 3)
    contributions = [
        one.wide_contribution(metrics_to_integers(n, P))
        for one, n in zip(opened, NUMBERS, strict=True)
    ]
    for decoded in total(opened, contributions, layout):
        assert (
            np.abs(metrics_from_totals(decoded, P) - np.sum(NUMBERS, axis=0)).max() <= 3 * 2.0**-31
        )


def limbs_of_the_sum(sums: list[SumSession], round_: int) -> np.ndarray:
    layout = layout_of(4, P, wide=True)
    opened = open_all(sums, layout.values, [[]] * 3, round_)
    return total(
        opened,
        [
            one.wide_contribution(metrics_to_integers(n, P))
            for one, n in zip(opened, NUMBERS, strict=True)
        ],
        layout,
    )[0]


def test_sums_of_limbs_show_no_more_than_the_sum_of_the_numbers(
    sums: list[SumSession], monkeypatch: pytest.MonkeyPatch
):
    """How often limbs carried depends on the single numbers: it is the same in two sums of the
    same numbers only if they are not masked.
    """
    one, two = limbs_of_the_sum(sums, 1), limbs_of_the_sum(sums, 2)
    assert (one != two).mean() > 0.2
    wrapped = [
        np.array(
            [x % 2**64 for x in join(t.tolist(), P.value_bits - 1, len(t) // 4)], dtype=np.uint64
        )
        for t in (one, two)
    ]
    assert np.array_equal(*wrapped)
    from privfl.secagg import masks

    def only_the_vector(self: Any, integers: np.ndarray, real: Any = masks.Masks.apply) -> None:
        if len(integers) > 4:
            real(self, integers)

    monkeypatch.setattr(masks.Masks, "apply", only_the_vector)
    assert np.array_equal(limbs_of_the_sum(sums, 3), limbs_of_the_sum(sums, 4))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 2.0**33])
def test_metrics_that_cannot_be_summed_are_refused(bad: float):
    with pytest.raises(
        PrivflError, match="a metric returned NaN, an infinite number, or one too large"
    ):
        metrics_to_integers(np.array([1.0, bad]), P)


def test_the_agreed_range_is_a_power_of_two_above_every_site():
    keys = RunKeys.make(P)

    def context(site: str) -> bytes:
        return site.encode()

    vectors = {"a": np.array([0.3, -0.7]), "b": np.array([-5.0]), "c": np.zeros(2)}
    sealed = {site: seal_exponent(keys, v, context(site)) for site, v in vectors.items()}
    assert agreed_range(keys, sealed, SITES, context) == 8.0
    assert agreed_range(keys, {"c": sealed["c"]}, ("c",), context) == 2.0**-256
    for wrong in (
        {"a": sealed["a"]},
        sealed | {"b": sealed["a"]},
        sealed | {"b": "zz"},
        sealed | {"b": ""},
    ):
        with pytest.raises(ProtocolError):
            agreed_range(keys, wrong, SITES, context)
