"""Attacks in this process: each succeeds where nothing protects, and finds nothing where privfl
does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import privfl.dp.optimizer
from privacy_audits.audits import distinguisher, inversion, protocol
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
    plain = inversion._update(images, digits, training.NO_NOISE, training.NO_CLIPPING)
    assert inversion.psnr(inversion.invert(plain), record) > inversion.RECOVERED
    private = inversion._update(images, digits, inversion.SIGMA, inversion.CLIP)
    assert inversion.psnr(inversion.invert(private), record) < 15
    assert inversion.psnr(inversion.invert(inversion._on_the_wire(plain)), record) < 15
    assert not inversion.invert(np.zeros_like(plain)).any()


def test_every_trick_has_a_claim():
    assert set(protocol._CLAIMS) == set(TRICKS)
    assert all(trick.__doc__ for trick in TRICKS.values())


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_no_trick_gets_anything(tmp_path: Path):
    results = list(protocol.results(tmp_path, lambda text: None))
    assert {r.name for r in results if r.verdict is not Verdict.CONSISTENT} == set()
