"""Who could learn what."""

from __future__ import annotations

import pytest

from privfl.accounting import adversaries, epsilon_of
from tests.accounting.histories import printed, steps_of

# PLD epsilons at 1e-5 for q = 0.02, sigma = 1, 1000 steps: of the public, of one other site, of
# two, ...
DISTRIBUTED = {(4, 1): "2.98 3.90 6.11 15.7", (8, 1): "3.43 3.90 4.58 5.62 7.41 10.9 19.8 58.2"}


@pytest.mark.slow
@pytest.mark.parametrize(("members", "collusion"), DISTRIBUTED)
def test_the_epsilons_of_distributed_noise(members: int, collusion: int):
    expected = DISTRIBUTED[members, collusion].split()
    listed = adversaries("distributed", members, collusion)
    assert [adversary.colluders for adversary in listed] == list(range(members))
    for adversary, text in zip(listed, expected, strict=True):
        epsilon = epsilon_of([steps_of(0.02, adversary.noise_factor, 1000)], 1e-5, "pld").upper
        assert epsilon == pytest.approx(float(text), abs=printed(text))


@pytest.mark.parametrize("members", [2, 3, 8])
@pytest.mark.parametrize("collusion", [0, 1])
def test_noise_of_each_site_faces_everybody(members: int, collusion: int):
    listed = adversaries("site", members, collusion)
    assert [adversary.noise_factor for adversary in listed] == [1.0] * members


@pytest.mark.parametrize(("members", "collusion"), [(3, 1), (5, 2), (9, 3)])
def test_the_adversary_of_all_colluders_is_the_charged_one(members: int, collusion: int):
    noise = [adversary.noise_factor for adversary in adversaries("distributed", members, collusion)]
    assert noise[collusion] == 1.0
    assert noise == sorted(noise, reverse=True)
    assert all(factor > 0.0 for factor in noise)


def test_each_adversary_says_what_it_sees():
    listed = adversaries("distributed", 4, 1)
    assert listed[0].who == "the public"
    assert "one other site" in listed[1].who
    assert "3 other sites" in listed[3].who
    assert "this site's own updates" in listed[3].sees
    assert "sums over 3 sites" in listed[1].sees


@pytest.mark.parametrize(("members", "collusion"), [(1, 0), (0, 0), (3, 3), (3, -1)])
def test_such_a_run_has_no_adversaries(members: int, collusion: int):
    with pytest.raises(ValueError, match="no adversaries"):
        adversaries("site", members, collusion)
