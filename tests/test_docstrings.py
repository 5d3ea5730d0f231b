"""Examples in docstrings print what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest

from tests.conftest import ROOT

# What `import privfl` shows has its examples run by tests/api/test_face.py.
FACE = {"privfl.engine", "privfl.errors", "privfl.secure_sum"}


def modules_with_examples() -> list[str]:
    paths = [path for path in ROOT.glob("privfl/**/*.py") if ">>> " in path.read_text()]
    return sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths)


@pytest.mark.parametrize("name", [n for n in modules_with_examples() if n not in FACE])
def test_examples_print_what_they_say(name: str):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_the_public_functions_of_accounting_have_examples():
    from privfl import accounting

    names = ["PoissonGaussian", "RenyiFilter", "epsilon_of", "least_noise_multiplier"]
    names += ["DiscreteGaussian", "MetricRelease", "RdpAccountant", "adversaries", "divergences"]
    names += ["event_from_dict", "person_epsilon"]
    without = [name for name in names if ">>> " not in (getattr(accounting, name).__doc__ or "")]
    assert not without
