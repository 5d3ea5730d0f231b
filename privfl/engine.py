"""`privfl.PrivacyEngine`: the protection of a site in a training loop of the user's own, alone
or with the other ranks of a communicator.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Self

from privfl._engine_backends import CommBackend, EngineLedger, LocalBackend, join_steps
from privfl._rank_group import TIMEOUT, RankGroup, refuse, transport_of
from privfl.dp.engine import Engine
from privfl.dp.engine_backend import EngineBackend
from privfl.environment import launcher_size
from privfl.errors import PrivflError, is_number, shown, words_checked
from privfl.noise.randomness import SystemRandomness

# What Opacus' constructor takes, and why this one does not.
_ABSENT = {
    "accountant": "every step is accounted for by its Renyi divergences; leave it out",
    "secure_mode": "noise and batches always come from the operating system's randomness; leave it "
    "out",
}


class PrivacyEngine(Engine):
    """Opacus' ``PrivacyEngine`` with a ledger, sound sampling and system randomness; with
    ``comm`` every step is a secure sum over all ranks.

    An engine serves one training run. As a context manager it closes its ledger at the end.

    With ``comm`` every rank is a site, and making the engine is collective, as is every
    ``optimizer.step()``. All ranks start from the same parameters and make the same number of
    steps. Rank 0 also adds, and holds the key like all others. What is wrong at one rank is one
    sentence at all of them.

    Guarantee: Every step is charged to the ledger before it is made, and stays charged: nothing is
        refunded. With ``comm``, what any ``collusion`` ranks pool shows them only sums with at
        least the noise that is charged. Keys are not pinned, so rank 0 must run this code
        unchanged.

    Opacus' ``accountant`` and ``secure_mode`` do not exist here: every step is accounted for by its
    Renyi divergences, and all randomness is the operating system's.

    Args:
        site: whose records these are; the name in the ledger, of letters, digits, '-' and '_'.
        comm: an mpi4py communicator of at least ``collusion`` + 2 ranks, or a privfl transport;
            None to train alone.
        ledger: the file of this site's ledger, which is begun where there is none; None to keep no
            account beyond this engine.
        budget: (epsilon, delta) that a ledger begun here may spend in all runs together. An
            existing ledger keeps its own, and another one is refused.
        collusion: how many ranks may pool what they see, at most all but two; of no effect without
            ``comm``.

    Raises:
        PrivflError: If an argument is wrong; with ``comm`` at all ranks.
        TypeError: If an argument is unknown or missing; the other ranks get a PrivflError.

    Example:
        >>> import torch
        >>> import privfl
        >>> records = torch.utils.data.TensorDataset(torch.randn(64, 3), torch.arange(64) % 2)
        >>> model = torch.nn.Linear(3, 2)
        >>> with privfl.PrivacyEngine(site="zurich") as engine:
        ...     model, optimizer, loader = engine.make_private(
        ...         module=model,
        ...         optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ...         data_loader=torch.utils.data.DataLoader(records, batch_size=16),
        ...         noise_multiplier=1.0,
        ...         max_grad_norm=1.0,
        ...     )
        ...     for inputs, targets in loader:
        ...         optimizer.zero_grad()
        ...         torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        ...         optimizer.step()
        >>> engine
        PrivacyEngine(site='zurich', ledger=None, 4 steps, epsilon 4.871 at delta 1e-05, closed)
    """

    __module__ = "privfl"

    @words_checked(lambda _, values, problem: refuse(values, problem), "PrivacyEngine", _ABSENT)
    def __init__(
        self,
        *,
        site: str,
        comm: Any = None,
        ledger: str | os.PathLike[str] | None = None,
        budget: tuple[float, float] | None = None,
        collusion: int = 1,
    ) -> None:
        """Take part as ``site``; see the class for the arguments."""
        problem = _argument_problem(site, ledger, budget, collusion)
        self._ranks = ""
        backend: EngineBackend
        if comm is None:
            if problem:
                raise PrivflError(problem)
            _warn_if_launched()
            self._ledger = EngineLedger(site, ledger, budget)
            backend = LocalBackend(self._ledger)
        else:
            group = RankGroup(transport_of(comm), TIMEOUT)
            sums = join_steps(group, None, problem or _collusion_problem(collusion, group.size))
            self._ledger = EngineLedger(site, ledger, budget)
            backend = CommBackend(self._ledger, group, sums, int(collusion))
            self._ranks = f"rank {group.rank} of {group.size}, collusion={collusion}, "
        super().__init__(backend, SystemRandomness())

    @property
    def ledger(self) -> Path | None:
        """The file of this site's ledger; None without one."""
        return self._ledger.path

    def close(self) -> None:
        """Close the ledger, for another engine or program to use; no step can be made any more."""
        self._ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        """Site, ledger, the steps so far, and the epsilon that they have spent."""
        spent, delta, steps = "no run yet", self._ledger.delta, len(self.accountant)
        if delta is not None:
            spent = f"{steps} {'step' if steps == 1 else 'steps'}, "
            spent += f"epsilon {self.get_epsilon(delta):.4g} at delta {delta:g}"
        path = None if self._ledger.path is None else str(self._ledger.path)
        return (
            f"PrivacyEngine(site={self._ledger.site!r}, {self._ranks}ledger={path!r}, "
            f"{spent}{', closed' * self._ledger.closed})"
        )


def _argument_problem(site: Any, ledger: Any, budget: Any, collusion: Any) -> str:
    """What is wrong with the arguments of a :class:`PrivacyEngine`, or nothing."""
    # As a ledger has it.
    if not (isinstance(site, str) and re.fullmatch(r"[\w-]+", site)):
        return f"site must be a name of letters, digits, '-' and '_', got {shown(site)}"
    path = os.fspath(ledger) if isinstance(ledger, str | os.PathLike) else None
    if ledger is not None and not (isinstance(path, str) and path):
        return f"ledger must be the path of a file, got {shown(ledger)}"
    if budget is not None and not _is_budget(budget):
        pair = isinstance(budget, tuple | list) and len(budget) == 2
        return (
            "PrivacyEngine's budget must be (epsilon, delta), a number above 0 and one between 0 "
            f"and 1, got {f'({shown(budget[0])}, {shown(budget[1])})' if pair else shown(budget)}"
        )
    if budget is not None and ledger is None:
        return "PrivacyEngine has a budget but no ledger to keep it in; name a file as ledger"
    if not is_number(collusion, Integral):
        return f"collusion must be a whole number of ranks, got {shown(collusion)}"
    return ""


def _is_budget(budget: Any) -> bool:
    if not (isinstance(budget, tuple | list) and len(budget) == 2):
        return False
    epsilon, delta = budget
    return (
        is_number(epsilon, Real)
        and is_number(delta, Real)
        and 0 < epsilon < math.inf
        and 0 < delta < 1
    )


def _collusion_problem(collusion: int, ranks: int) -> str:
    """Why so many of so many ranks cannot be withstood, or nothing."""
    if ranks < 3:
        return (
            f"PrivacyEngine with comm needs at least 3 ranks, this communicator has {ranks}: of "
            "two, each would see the other's part of a sum alone"
        )
    if not 1 <= collusion <= ranks - 2:
        return (
            f"collusion {collusion} of {ranks} ranks cannot be withstood: it must be at least 1 "
            f"and at most {ranks - 2} (ranks less two)"
        )
    return ""


def _warn_if_launched() -> None:
    """A launcher started more ranks than this one, which is about to train alone."""
    ranks = launcher_size() or 1
    if ranks > 1:
        warnings.warn(
            f"{ranks} ranks were started, but this PrivacyEngine trains alone at each of them; "
            "to sum over all, give it comm=MPI.COMM_WORLD",
            stacklevel=4,
        )
