"""What `import privfl` offers: names that complete, signatures with types, one sentence for each
wrong argument, and at all ranks.
"""

from __future__ import annotations

import ast
import doctest
import inspect
import pickle
import pydoc
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import opacus
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import privfl
from privfl.ledger import Ledger
from privfl.transport import connect
from tests.conftest import ROOT, in_threads

NAMES = [
    "BudgetError",
    "DamagedError",
    "InternalError",
    "MismatchError",
    "OutsideGuarantee",
    "PrivacyEngine",
    "PrivflError",
    "ProtocolError",
    "SecureSum",
    "__version__",
    "accounting",
]
CLASSES = [name for name in NAMES if name[0].isupper()]


# -- names -----------------------------------------------------------------------------------------


def test_the_exported_names():
    assert privfl.__all__ == dir(privfl) == NAMES
    for name in NAMES:
        assert getattr(privfl, name) is not None
    assert [getattr(privfl, name).__module__ for name in CLASSES] == ["privfl"] * len(CLASSES)


def test_imports_for_type_checkers_are_those_that_are_made_later():
    tree = ast.parse(Path(privfl.__file__).read_text())

    def imported(body: list[ast.stmt]) -> set[str]:
        return {alias.name for n in body if isinstance(n, ast.ImportFrom) for alias in n.names}

    (checking,) = [node for node in tree.body if isinstance(node, ast.If)]
    (table,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_LAZY"
    ]
    later = set(ast.literal_eval(table))
    assert imported(checking.body) == later
    assert later | (imported(tree.body) & set(NAMES)) == set(NAMES)
    assert not later & imported(tree.body)


def test_the_accounting_needs_no_import_of_its_own_and_a_name_that_is_near_is_shown():
    script = """
import sys, privfl
assert not {"numpy", "torch"} & set(sys.modules)
steps = privfl.accounting.Gaussian(noise_multiplier=2.0)
assert 0 < privfl.accounting.epsilon_of([steps], 1e-5).upper < 3
assert "torch" not in sys.modules
try:
    privfl.PrivacyEngin
except AttributeError as error:
    sys.exit(str(error) != "module 'privfl' has no attribute 'PrivacyEngin'; "
             "did you mean 'PrivacyEngine'?")
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_help_shows_what_is_public():
    page = pydoc.plain(pydoc.render_doc(privfl))
    for name in CLASSES:
        assert f"class {name}(" in page or f"class {name}\n" in page.replace("builtins.", ""), name
    assert "accounting" in page


@pytest.mark.parametrize("name", [name for name in CLASSES if "Error" in name])
def test_errors_are_one_tree_and_survive_pickle(name: str):
    kind = getattr(privfl, name)
    assert issubclass(kind, privfl.PrivflError)
    error = kind() if name == "MismatchError" else kind("one sentence")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (kind, str(error))
    assert pickle.loads(pickle.dumps(kind)) is kind


# -- signatures and help ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["make_private", "make_private_with_epsilon"])
def test_the_parameters_of_opacus_are_written_out(method: str):
    ours = inspect.signature(getattr(privfl.PrivacyEngine, method)).parameters
    theirs = inspect.signature(getattr(opacus.PrivacyEngine, method)).parameters
    assert list(ours) == [name for name in theirs if name != "kwargs"]
    for name, parameter in ours.items():
        assert parameter.kind is theirs[name].kind, name
        assert name == "self" or parameter.annotation is not inspect.Parameter.empty, name
        if name != "criterion":  # None here, and the same loss
            assert parameter.default == theirs[name].default, name


def test_help_of_the_engine_has_no_text_of_opacus_about_what_does_not_exist():
    page = pydoc.plain(pydoc.render_doc(privfl.PrivacyEngine))
    own = page[: page.index("Methods inherited from opacus")]
    assert "secure_mode" not in page.replace(
        "Opacus' ``accountant`` and ``secure_mode`` do not", ""
    )
    for word in ("torchcsprng", "Currently supported", "gdp", "per_layer", "adaptive"):
        assert word not in page, word
    for word in ["noise_multiplier", "collusion", "rand_on_empty: only False", "Guarantee:"]:
        assert word in own, word


@pytest.mark.parametrize("kind", [privfl.PrivacyEngine, privfl.SecureSum])
def test_every_argument_is_in_the_docstring(kind: type):
    methods = [kind, *(m for n, m in inspect.getmembers(kind, callable) if n.startswith("make"))]
    for method in methods:
        text = inspect.getdoc(method) or ""
        for name in inspect.signature(method).parameters:
            if name != "self":
                assert f"{name}:" in text or f"{name}," in text, (method, name)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.filterwarnings("ignore")
def test_examples_in_docstrings_run(name: str):
    for test in doctest.DocTestFinder(recurse=False).find(getattr(privfl, name), name):
        assert doctest.DocTestRunner().run(test).failed == 0


TYPED = """
    from typing import assert_type, Any
    import privfl
    from torch import nn
    from torch.optim import Optimizer
    from torch.utils.data import DataLoader

    def right(module: nn.Module, optimizer: Optimizer, loader: DataLoader[Any], mode: str) -> None:
        with privfl.PrivacyEngine(site="a", ledger="l", budget=(2.0, 1e-5)) as engine:
            assert_type(engine, privfl.PrivacyEngine)
            _, _, _ = engine.make_private(
                module=module, optimizer=optimizer, data_loader=loader,
                noise_multiplier=1.0, max_grad_norm=1.0)
            _, _, _, _ = engine.make_private_with_epsilon(
                module=module, optimizer=optimizer, data_loader=loader, target_epsilon=2.0,
                target_delta=1e-5, epochs=1, max_grad_norm=1.0, grad_sample_mode="ghost")
            parts = engine.make_private(
                module=module, optimizer=optimizer, data_loader=loader,
                noise_multiplier=1.0, max_grad_norm=1.0, grad_sample_mode=mode)
            assert_type(parts, tuple[Any, ...])
            assert_type(engine.get_epsilon(1e-5), float)
        assert_type(privfl.accounting.epsilon_of([], 1e-5).upper, float)
        assert_type(privfl.BudgetError("x").exit_code, int)
        assert_type(privfl.SecureSum(None, value_bits=16).parameters.value_bits, int)

    def wrong(module: nn.Module, optimizer: Optimizer, loader: DataLoader[Any]) -> None:
        engine = privfl.PrivacyEngine(site=3)  # E: arg-type
        privfl.PrivacyEngine(site="a", accountant="rdp")  # E: call-arg
        _, _, _, _ = engine.make_private(  # E: misc
            module=module, optimizer=optimizer, data_loader=loader,
            noise_multiplier=1.0, max_grad_norm=1.0)
        engine.make_private(  # E: call-overload
            module=module, optimizer=optimizer, data_loader=loader,
            noise_multiplyer=1.0, max_grad_norm=1.0)
        privfl.SecureSum(None, path="tree")  # E: arg-type
        privfl.PrivacyEngin  # E: attr-defined
"""


def test_a_type_checker_sees_the_arguments_and_what_is_returned(tmp_path: Path):
    pytest.importorskip("mypy")
    file = tmp_path / "user.py"
    file.write_text(textwrap.dedent(TYPED))
    # Without what takes a type checker half a minute.
    heavy = ("torch", "opacus", "scipy", "numpy", "mpi4py", "dp_accounting", "pydantic", "tenseal")
    skipped = ",".join(f"mypy-{package}.*" for package in (*heavy, "cryptography"))
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nignore_missing_imports = true\nfollow_imports = silent\n"
        f"[{skipped}]\nfollow_imports = skip\nfollow_imports_for_stubs = true\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--no-error-summary", file],
        cwd=tmp_path,
        env={"MYPYPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    found = {
        (int(line.split(":")[1]), line.rsplit("[", 1)[1].rstrip("]"))
        for line in done.stdout.splitlines()
        if ": error:" in line
    }
    expected = {
        (number, line.rsplit("# E: ", 1)[1])
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if "# E: " in line
    }
    assert found == expected, done.stdout + done.stderr


# -- context managers and what they show -----------------------------------------------------------


def _records(count: int = 60) -> TensorDataset:
    x = torch.randn(count, 5, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x.sum(dim=1) > 0).long())


def _parts(**changes: Any) -> dict[str, Any]:
    model = nn.Linear(5, 2)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    return {
        "module": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "data_loader": DataLoader(_records(), batch_size=20),
        "max_grad_norm": 1.0,
    } | changes


def _train(engine: privfl.PrivacyEngine) -> None:
    model, optimizer, loader = engine.make_private(**_parts(noise_multiplier=1.0))
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_an_engine_closes_its_ledger_and_shows_what_is_spent(tmp_path: Path):
    path = tmp_path / "l"
    with privfl.PrivacyEngine(site="zurich", ledger=path) as engine:
        assert repr(engine) == f"PrivacyEngine(site='zurich', ledger='{path}', no run yet)"
        _train(engine)
        epsilon = engine.get_epsilon(1e-5)
        shown = f"PrivacyEngine(site='zurich', ledger='{path}', 3 steps, epsilon {epsilon:.4g} at "
        assert repr(engine) == shown + "delta 1e-05)"
    assert repr(engine) == shown + "delta 1e-05, closed)"
    with privfl.PrivacyEngine(site="zurich", ledger=path) as other:
        _train(other)
    with Ledger.read(path) as ledger:
        assert sum(ledger.steps("training").values()) == 6


def test_a_loop_that_fails_closes_the_ledger_too(tmp_path: Path):
    def loop() -> None:
        with privfl.PrivacyEngine(site="zurich", ledger=tmp_path / "l") as engine:
            _train(engine)
            raise KeyError("of the user's own")

    with pytest.raises(KeyError):
        loop()
    with privfl.PrivacyEngine(site="zurich", ledger=tmp_path / "l") as other:
        _train(other)


def test_ranks_show_who_they_are():
    def part(transport: Any) -> list[str]:
        with privfl.SecureSum(transport, range=2, value_bits=np.int64(16)) as secure:
            shown = [repr(secure)]
            secure.sum([1.0])
        shown.append(repr(secure))
        with privfl.PrivacyEngine(site=f"s{transport.rank}", comm=transport) as engine:
            return [*shown, repr(engine)]

    for rank, (open_, closed, engine) in enumerate(in_threads(connect(3), part)):
        assert open_ == f"SecureSum(rank {rank} of 3, value_bits=16, range=2, path='star')"
        assert closed == open_[:-1] + ", closed)"
        assert engine == (
            f"PrivacyEngine(site='s{rank}', rank {rank} of 3, collusion=1, ledger=None, no run yet)"
        )


# -- wrong arguments -------------------------------------------------------------------------------

ENGINE: list[tuple[dict[str, Any], str]] = [
    ({"comm": 3}, "comm must be an mpi4py communicator, for example MPI.COMM_WORLD, or a transport "
     "of privfl, got 3"),
    ({"comm": nn.Linear}, "or a transport of privfl, got the class Linear"),
    ({"site": 5}, "site must be a name of letters, digits, '-' and '_', got 5"),
    ({"site": ""}, "'-' and '_', got ''"),
    ({"site": "a/b"}, "'-' and '_', got 'a/b'"),
    ({"ledger": 3}, "ledger must be the path of a file, got 3"),
    ({"ledger": ""}, "ledger must be the path of a file, got ''"),
    ({"ledger": "l", "budget": "x"}, "budget must be (epsilon, delta), a number above 0 and one "
     "between 0 and 1, got 'x'"),
    ({"ledger": "l", "budget": (3,)}, "between 0 and 1, got a tuple"),
    ({"ledger": "l", "budget": (-1, 2)}, "between 0 and 1, got (-1, 2)"),
    ({"ledger": "l", "budget": (True, 0.1)}, "between 0 and 1, got (True, 0.1)"),
    ({"ledger": "l", "budget": (2.0, float("nan"))}, "between 0 and 1, got (2.0, nan)"),
    ({"budget": (2.0, 1e-5)}, "has a budget but no ledger to keep it in"),
    ({"collusion": True}, "collusion must be a whole number of ranks, got True"),
    ({"collusion": 1.5}, "collusion must be a whole number of ranks, got 1.5"),
    ({"collusion": None}, "collusion must be a whole number of ranks, got None"),
]  # fmt: skip
MAKE: list[tuple[dict[str, Any], str]] = [
    ({"module": 3}, "module must be a torch Module, got 3"),
    ({"module": nn.Linear}, "module must be a torch Module, got the class Linear"),
    ({"optimizer": None}, "optimizer must be a torch Optimizer, got None"),
    ({"data_loader": _records()}, "data_loader must be a torch DataLoader, got a TensorDataset"),
    ({"criterion": "mean"}, "criterion must be a loss function, got 'mean'"),
    ({"max_grad_norm": [1.0, 1.0]}, "max_grad_norm must be one positive number, got a list"),
    ({"max_grad_norm": -1}, "max_grad_norm must be one positive number, got -1"),
    ({"max_grad_norm": 10**400}, "max_grad_norm must be one positive number, got 1000"),
    ({"batch_first": 1}, "batch_first must be True or False, got 1"),
    ({"loss_reduction": "none"}, "does not take loss_reduction='none': choose mean or sum"),
    ({"clipping": None}, "does not take clipping=None: only 'flat' clipping is accounted for"),
    ({"grad_sample_mode": ["ghost"]}, "does not take grad_sample_mode=a list: choose one of"),
    ({"wrap_model": False, "grad_sample_mode": "ghost"}, "ghost clipping wraps the model"),
]  # fmt: skip
NOISE: list[tuple[dict[str, Any], str]] = [
    ({"noise_multiplier": "1"}, "noise_multiplier must be a number, got '1'"),
    ({"noise_multiplier": torch.ones(2)}, "noise_multiplier must be a number, got a Tensor"),
    ({"noise_multiplier": True}, "noise_multiplier must be a number, got True"),
]
TARGET: list[tuple[dict[str, Any], str]] = [
    ({"target_epsilon": -1}, "target_epsilon must be one positive number, got -1"),
    ({"target_epsilon": float("inf")}, "target_epsilon must be one positive number, got inf"),
    ({"target_delta": 1}, "target_delta must be between 0 and 1, got 1"),
    ({"target_delta": None}, "target_delta must be a number, got None"),
    ({"epochs": 0}, "epochs must be a whole number above 0, got 0"),
    ({"epochs": 1.5}, "epochs must be a whole number above 0, got 1.5"),
]
WORDS: list[tuple[str, dict[str, Any], str]] = [
    ("make_private", {"noise_multiplyer": 1}, "make_private takes no noise_multiplyer; did you "
     "mean 'noise_multiplier'?"),
    ("make_private", {"epochs": 3}, "make_private takes no epochs: it belongs to "
     "make_private_with_epsilon"),
    ("make_private", {"xyz": 3}, "make_private takes no xyz"),
    ("make_private", {}, "make_private needs noise_multiplier"),
    ("make_private_with_epsilon", {"noise_multiplier": 1.0}, "make_private_with_epsilon takes no "
     "noise_multiplier: it chooses the least that is enough"),
    ("make_private_with_epsilon", {"target_eps": 1.0}, "make_private_with_epsilon takes no "
     "target_eps; did you mean 'target_epsilon'?"),
]  # fmt: skip
SECURE_SUM: list[tuple[dict[str, Any], str]] = [
    ({"value_bits": "a"}, "value_bits must be between 12 and 28, got 'a'"),
    ({"value_bits": 0}, "value_bits must be between 12 and 28, got 0"),
    ({"value_bits": 16.0}, "value_bits must be between 12 and 28, got 16.0"),
    ({"timeout": -1}, "timeout must be a number of seconds above 0, got -1"),
    ({"timeout": None}, "timeout must be a number of seconds above 0, got None"),
    ({"range": "x"}, "a number as the public range, or none for integers, got 'x'"),
    ({"range": True}, "a number as the public range, or none for integers, got True"),
    ({"range": 10**400}, "public range of a sum must be between"),
    ({"rounding": ["up"]}, "rounding nearest or stochastic and path star or reduce, got a list"),
    ({"path": None}, "path star or reduce, got 'nearest' and None"),
]


def _words(value: object) -> str:
    """A test's name in all processes: not every argument prints the same everywhere."""
    return value if isinstance(value, str) else " ".join(value)  # type: ignore[call-overload]


def _sentence(kind: type[Exception], call: Callable[[], Any]) -> str:
    with pytest.raises(kind) as failure:
        call()
    assert failure.type is kind
    text = str(failure.value)
    assert text
    assert "\n" not in text
    assert len(text) < 250
    return text


@pytest.mark.parametrize(("wrong", "sentence"), ENGINE, ids=str)
def test_a_wrong_argument_of_an_engine(wrong: dict[str, Any], sentence: str):
    text = _sentence(privfl.PrivflError, lambda: privfl.PrivacyEngine(**({"site": "a"} | wrong)))
    assert sentence in text


@pytest.mark.parametrize(("wrong", "sentence"), [*MAKE, *NOISE], ids=_words)
def test_a_wrong_argument_of_make_private(wrong: dict[str, Any], sentence: str):
    arguments = _parts(noise_multiplier=1.0) | wrong
    engine = privfl.PrivacyEngine(site="a")
    assert sentence in _sentence(privfl.PrivflError, lambda: engine.make_private(**arguments))


@pytest.mark.parametrize(("wrong", "sentence"), [*MAKE, *TARGET], ids=_words)
def test_a_wrong_argument_of_make_private_with_epsilon(wrong: dict[str, Any], sentence: str):
    arguments = _parts(target_epsilon=2.0, target_delta=1e-5, epochs=1) | wrong
    engine = privfl.PrivacyEngine(site="a")
    assert sentence in _sentence(
        privfl.PrivflError, lambda: engine.make_private_with_epsilon(**arguments)
    )


@pytest.mark.parametrize(("method", "wrong", "sentence"), WORDS, ids=str)
def test_a_wrong_word(method: str, wrong: dict[str, Any], sentence: str):
    call = getattr(privfl.PrivacyEngine(site="a"), method)
    assert _sentence(TypeError, lambda: call(**_parts(**wrong))) == sentence


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: privfl.PrivacyEngine(), "PrivacyEngine needs site"),
        (lambda: privfl.PrivacyEngine("a"), "PrivacyEngine takes site and all that follows by "
         "name only"),
        (lambda: privfl.PrivacyEngine(site="a", ledgr="l"), "PrivacyEngine takes no ledgr; did "
         "you mean 'ledger'?"),
        (lambda: privfl.PrivacyEngine(site="a", secure_mode=True), "PrivacyEngine takes no "
         "secure_mode: noise and batches always come from the operating system's randomness; "
         "leave it out"),
        (lambda: privfl.PrivacyEngine(site="a", accountant="rdp"), "PrivacyEngine takes no "
         "accountant: every step is accounted for by its Renyi divergences; leave it out"),
        (lambda: privfl.SecureSum(), "SecureSum needs comm"),
        (lambda: privfl.SecureSum(None, comm=None), "SecureSum was given comm twice"),
        (lambda: privfl.SecureSum(None, 16), "SecureSum takes value_bits and all that follows by "
         "name only"),
        (lambda: privfl.SecureSum(None, value_bit=16), "SecureSum takes no value_bit; did you "
         "mean 'value_bits'?"),
    ],
)  # fmt: skip
def test_a_wrong_word_of_a_constructor(call: Callable[[], Any], sentence: str):
    assert _sentence(TypeError, call) == sentence


def test_other_wrong_calls():
    engine = privfl.PrivacyEngine(site="a")
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: privfl.SecureSum(None), "comm must be an mpi4py communicator"),
        (lambda: engine.get_epsilon(0), "delta must be between 0 and 1, got 0"),
        (lambda: engine.get_epsilon("1e-5"), "delta must be a number, got '1e-5'"),
        (lambda: engine.validate(module=3), "module must be a torch Module, got 3"),
        (lambda: engine.accountant.load_state_dict({"history": [], "mechanism": "rdp"}),
         "a checkpoint whose steps were not counted by privfl cannot be loaded"),
    ]  # fmt: skip
    for call, sentence in calls:
        assert sentence in _sentence(privfl.PrivflError, call)


# -- wrong arguments at one of several ranks -------------------------------------------------------


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"site": "a/b"}, "rank 1: site must be a name of letters"),
        ({"collusion": True}, "rank 1: collusion must be a whole number of ranks, got True"),
        ({"collusion": 2}, "rank 1: collusion 2 of 3 ranks cannot be withstood"),
        ({"budget": (1.0, 1e-5)}, "rank 1: PrivacyEngine has a budget but no ledger"),
        ({"colusion": 1}, "rank 1: PrivacyEngine takes no colusion; did you mean 'collusion'?"),
    ],
)
def test_what_is_wrong_at_one_rank_of_an_engine_ends_the_call_at_all(
    wrong: dict[str, Any], sentence: str
):
    def part(transport: Any) -> Any:
        own = wrong if transport.rank == 1 else {}
        return privfl.PrivacyEngine(**({"site": f"s{transport.rank}", "comm": transport} | own))

    results = in_threads(connect(3), part)
    assert all(sentence in str(results[rank]) for rank in (0, 2)), results
    assert sentence.removeprefix("rank 1: ") in str(results[1])
    kind = TypeError if "colusion" in wrong else privfl.PrivflError
    assert [type(result) for result in results] == [privfl.PrivflError, kind, privfl.PrivflError]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"noise_multiplyer": 1}, "make_private takes no noise_multiplyer"),
        ({"noise_multiplier": "1"}, "noise_multiplier must be a number, got '1'"),
        ({"data_loader": [[1.5, 2.5]]}, "data_loader must be a torch DataLoader, got a list"),
    ],
)
def test_what_is_wrong_at_one_rank_of_make_private_ends_the_call_at_all(
    bad: int, wrong: dict[str, Any], sentence: str
):
    def part(transport: Any) -> Any:
        engine = privfl.PrivacyEngine(site=f"s{transport.rank}", comm=transport)
        own = wrong if transport.rank == bad else {}
        return engine.make_private(**_parts(**({"noise_multiplier": 1.0} | own)))

    results = in_threads(connect(3), part)
    assert all(isinstance(r, privfl.PrivflError | TypeError) for r in results), results
    assert all(sentence in str(result) for result in results), results
    assert "1.5" not in str(results), "what one rank says to all quotes no record"


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("wrong", "sentence"), SECURE_SUM, ids=str)
def test_what_is_wrong_at_one_rank_of_a_secure_sum_ends_the_call_at_all(
    wrong: dict[str, Any], sentence: str
):
    def part(transport: Any) -> Any:
        return privfl.SecureSum(transport, **(wrong if transport.rank == 1 else {}))

    results = in_threads(connect(2), part)
    assert all(isinstance(r, privfl.PrivflError) and sentence in str(r) for r in results), results


@pytest.mark.timeout(120)
@pytest.mark.parametrize("bad", [0, 1])
def test_a_wrong_word_at_one_rank_of_a_secure_sum_ends_the_call_at_all(bad: int):
    def part(transport: Any) -> Any:
        return privfl.SecureSum(transport, **({"value_bit": 16} if transport.rank == bad else {}))

    results = in_threads(connect(2), part)
    assert all("SecureSum takes no value_bit; did you mean" in str(r) for r in results), results
    assert type(results[bad]) is TypeError


def test_an_engine_that_trains_alone_beside_other_ranks_warns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PMI_SIZE", "3")
    with pytest.warns(UserWarning, match="3 ranks were started.*give it comm=MPI.COMM_WORLD"):
        privfl.PrivacyEngine(site="a")
