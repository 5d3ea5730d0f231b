"""Examples in docstrings print what they say."""

from __future__ import annotations

import doctest
import importlib
from types import ModuleType

import pytest

from tests.conftest import ROOT

# Run by tests/api/test_face.py.
WITH_RANKS = {"privfl.engine"}


def modules_with_examples() -> list[str]:
    paths = [path for path in ROOT.glob("privfl/**/*.py") if ">>> " in path.read_text()]
    return sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths)


def run_examples(module: ModuleType) -> doctest.TestResults:
    """Run the examples of a module, and of its classes that say they are of `privfl` itself."""
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    public = [
        value for value in vars(module).values() if getattr(value, "__module__", "") == "privfl"
    ]
    for thing in [module, *(value for value in public if isinstance(value, type))]:
        for test in finder.find(thing, module.__name__, module):
            runner.run(test)
    return runner.summarize(verbose=False)


@pytest.mark.filterwarnings("ignore::privfl.OutsideGuarantee")
@pytest.mark.parametrize("name", [n for n in modules_with_examples() if n not in WITH_RANKS])
def test_examples_print_what_they_say(name: str):
    result = run_examples(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_the_public_functions_of_accounting_have_examples():
    from privfl import accounting

    names = ["PoissonGaussian", "RenyiFilter", "epsilon_of", "least_noise_multiplier"]
    names += ["DiscreteGaussian", "MetricRelease", "RdpAccountant", "adversaries", "divergences"]
    names += ["event_from_dict", "person_epsilon"]
    without = [name for name in names if ">>> " not in (getattr(accounting, name).__doc__ or "")]
    assert not without
