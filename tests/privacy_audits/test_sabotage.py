"""Defects are planted where they say, and the audits notice them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from privacy_audits.registry import AUDITS, Workshop
from privacy_audits.result import Verdict
from privacy_audits.sabotage.apply import Defect, Patch, _owner, plant, reached
from privacy_audits.sabotage.defects import DEFECTS, named
from privacy_audits.sabotage.matrix import audited, matrix
from privfl.errors import PrivflError

# One defect of a kind, and the check that notices it also when all of them are planted at once.
ONE_OF_A_KIND = {
    "noise-halved": "conformance/fedsgd/share variance",
    "clip-per-layer": "conformance/fedsgd/clipping",
    "shuffled-batches": "conformance/fedsgd/sampling spread",
    "rounds-uncharged": "conformance/fedsgd/charged before it leaves",
    "masks-off": "transcript/opened with the key",
}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_every_patch_names_what_is_there(defect: Defect):
    assert set(defect.seen_by) <= {audit.name for audit in AUDITS}
    for patch in defect.patches:
        owner, member = _owner(patch.target)
        assert member in vars(owner), f"{patch.target} does not exist"


def test_a_patch_of_what_is_gone_is_an_error():
    for target in ("privfl.dp.clipping.Clipper.clasp", "privfl.dp.nothing.clip"):
        gone = Defect(
            "gone", "", (), "fedsgd", (Patch("agent", target, lambda original: original),)
        )
        with pytest.raises(PrivflError, match="does not exist"):
            plant(gone, "agent")


def test_a_patch_leaves_proof_when_it_is_called_and_not_before(tmp_path: Path):
    program = (
        "import os; from pathlib import Path\n"
        "from privacy_audits.sabotage import defects, apply\n"
        "folder = Path(os.environ[apply.REACHED]); defect = defects.named('noise-halved')\n"
        "apply.plant(defect, 'trainer'); apply.plant(defect, 'agent')\n"
        "from privfl.noise.discrete_gaussian import DiscreteGaussian\n"
        "from privfl.noise.randomness import SystemRandomness\n"
        "assert not apply.reached(defect, folder)\n"
        "noise = DiscreteGaussian(1000.0, SystemRandomness()).draw(10_000)\n"
        "assert 450 < noise.std() < 550, noise.std()\n"
        "assert apply.reached(defect, folder)\n"
    )
    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        env={"PRIVACY_AUDITS_REACHED": str(tmp_path), "PATH": ""},
    )
    assert [path.name for path in tmp_path.iterdir()] == ["noise-halved-0"]
    assert not reached(DEFECTS[0], tmp_path)


@pytest.mark.slow
def test_a_clean_run_refutes_nothing_and_a_spoilt_one_all_that_is_spoilt(tmp_path: Path):
    """One run without, and one with five defects at once, each with a check of its own."""
    clean, spoilt = tmp_path / "clean", tmp_path / "spoilt"
    clean.mkdir()
    shop = Workshop(clean, modes=("fedsgd",))
    results = [result for audit in AUDITS if audit.quick for result in audit.run(shop)]
    assert [r.name for r in results if r.verdict is Verdict.REFUTED] == []
    assert set(ONE_OF_A_KIND.values()) <= {r.name for r in results}
    spoilt.mkdir()
    planted = [named(name) for name in ONE_OF_A_KIND]
    found = audited(spoilt, planted)
    assert all(reached(defect, spoilt) for defect in planted)
    refuted = {r.name for rs in found.values() for r in rs if r.verdict is Verdict.REFUTED}
    assert set(ONE_OF_A_KIND.values()) <= refuted
    # What no defect touches stays.
    assert not refuted & {"conformance/fedsgd/sums", "transcript/uniform"}


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_every_defect_is_noticed(defect: Defect):
    (row,) = matrix([defect.name], 1, lambda text: None)
    assert row.reached == 1, "the patches were never called"
    assert row.seen, row.line()
