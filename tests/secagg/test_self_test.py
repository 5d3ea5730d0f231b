"""The self-test notices each stage that does not do what the others rely on."""

from __future__ import annotations

import numpy as np
import pytest

from privfl.errors import PrivflError
from privfl.secagg import adders, checksum, ckks, masks, self_test


def test_it_holds_here():
    assert self_test.prove() is True


def test_words_that_do_not_add_up_mean_the_evaluator(monkeypatch: pytest.MonkeyPatch):
    real = adders.WordAdder.add

    def wrong(self, index, block):
        words = np.frombuffer(block, dtype="<u8").copy()
        words[-1] ^= np.uint64(1)
        real(self, index, words.data.cast("B"))

    monkeypatch.setattr(adders.WordAdder, "add", wrong)
    assert self_test.prove() is False


def no_masks(self, integers):
    return None


def wrong_rounding(self, coefficients):
    return (coefficients >> np.int64(self.parameters.delta_bits + 1)).view(np.uint64)


@pytest.mark.parametrize(
    ("owner", "name", "sabotage", "sentence"),
    [
        (masks.Masks, "apply", no_masks, "masks hide nothing"),
        (ckks.SumKey, "round", wrong_rounding, "a sum of three vectors is wrong"),
    ],
)
def test_a_stage_that_fails_is_refused(
    monkeypatch: pytest.MonkeyPatch, owner, name, sabotage, sentence
):
    monkeypatch.setattr(owner, name, sabotage)
    with pytest.raises(PrivflError, match=sentence):
        self_test.prove()


def test_a_checksum_that_takes_everything_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checksum.Checksum, "fits", lambda self, sums: True)
    with pytest.raises(PrivflError, match="the sum of a wrong set of members decodes"):
        self_test.prove()
