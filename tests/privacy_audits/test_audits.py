"""Attacks in this process: each succeeds where nothing protects, and finds nothing where privfl
does.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import privfl.dp.optimizer
from privacy_audits.audits import distinguisher, inversion, membership, protocol, transcript
from privacy_audits.bounds.one_run import Guesses
from privacy_audits.result import Verdict
from privacy_audits.targets import training
from privacy_audits.targets.cheating import TRICKS

pytestmark = pytest.mark.slow


def test_the_distinguisher_refutes_forgotten_noise_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
):
    assert [r.verdict for r in distinguisher.results(300)].count(Verdict.REFUTED) == 0
    gaussian = privfl.dp.optimizer.gaussian
    monkeypatch.setattr(privfl.dp.optimizer, "gaussian", lambda *given: 1e-6 * gaussian(*given))
    assert {r.verdict for r in distinguisher.results(300)} == {Verdict.REFUTED}


def test_a_plain_update_gives_its_record_away_and_a_private_one_does_not():
    images, digits = inversion._pictures(1)
    record = images.numpy()[0].astype(np.float64)
    relu = nn.ReLU()
    plain = inversion._update(images, digits, relu, training.NO_NOISE, training.NO_CLIPPING)
    assert inversion.psnr(inversion.invert(plain), record) > inversion.RECOVERED
    private = inversion._update(images, digits, relu, inversion.SIGMA, inversion.CLIP)
    assert inversion.psnr(inversion.invert(private), record) < 15
    assert inversion.psnr(inversion.invert(inversion._on_the_wire(plain)), record) < 15
    assert not inversion.invert(np.zeros_like(plain)).any()


def test_deep_leakage_reads_plain_and_clipped_updates_and_no_private_one():
    images, digits = inversion._pictures(1)
    record = images.numpy()[0].astype(np.float64)

    def recovered(sigma: float, clip: float) -> float:
        update = inversion._update(images, digits, nn.Sigmoid(), sigma, clip)
        return inversion.psnr(inversion.dlg(update, clip), record)

    assert recovered(training.NO_NOISE, training.NO_CLIPPING) > inversion.RECOVERED
    # Clipping hides nothing: it is the noise that protects.
    assert recovered(training.NO_NOISE, inversion.CLIP) > inversion.RECOVERED
    assert recovered(inversion.SIGMA, inversion.CLIP) < 9
    plain = inversion._update(images, digits, nn.Sigmoid(), training.NO_NOISE, training.NO_CLIPPING)
    wire = inversion.dlg(inversion._on_the_wire(plain), training.NO_CLIPPING)
    assert inversion.psnr(wire, record) < 9
    # An update that says nothing leads nowhere, and to no number that is none.
    assert np.isfinite(inversion.dlg(np.zeros_like(plain), inversion.CLIP)).all()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_membership_is_told_without_protection_and_not_with_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(membership, "SHADOWS", 8)
    results = {r.name.removeprefix("membership/"): r for r in membership.results()}
    for attack in ("LiRA", "RMIA"):
        control, private = results[f"{attack}, without protection"], results[f"{attack}, private"]
        assert control.statistic.value is not None
        assert private.statistic.value is not None
        assert control.statistic.value > 0.65
        assert abs(private.statistic.value - 0.5) < 0.1
        # Without protection the same guesses would refute the claim.
        assert control.verdict is private.verdict is Verdict.CONSISTENT


def test_the_power_of_membership_is_that_of_its_test(monkeypatch: pytest.MonkeyPatch):
    many = membership.GUESSES
    assert membership._power(Guesses(membership.RECORDS, many, many)) == 1.0
    assert membership._power(Guesses(membership.RECORDS, many, round(0.75 * many))) < 0.05
    # The price of a large delta: nothing could refute.
    monkeypatch.setattr(membership, "DELTA", 1e-5)
    assert membership._power(Guesses(membership.RECORDS, many, many)) == 0.0


def test_every_trick_has_a_claim():
    assert set(protocol._CLAIMS) == set(TRICKS)
    assert all(trick.__doc__ for trick in TRICKS.values())


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_no_trick_gets_anything(tmp_path: Path):
    results = list(protocol.results(tmp_path, lambda text: None))
    assert {r.name for r in results if r.verdict is not Verdict.CONSISTENT} == set()


@pytest.mark.parametrize(
    "spelled",
    [
        lambda v: v[8:72].tolist(),
        lambda v: "ab12" + v[8:72].tobytes().hex(),
        lambda v: base64.b64encode(v[8:72].tobytes()).decode(),
    ],
    ids=["numbers", "hexadecimal", "base64"],
)
def test_a_vector_that_is_spelled_in_a_message_is_found(spelled: Callable[[np.ndarray], object]):
    vector = np.random.default_rng().normal(size=72)
    vector[:8] = 0.0
    message = {"site": "aa", "facts": [{"range": spelled(vector)}, 3, None]}
    assert transcript._in_the_clear(vector, transcript._spelled_out(message))
    assert not transcript._in_the_clear(vector[::-1], transcript._spelled_out(message))
    assert not transcript._in_the_clear(np.zeros(72), transcript._spelled_out(message))
