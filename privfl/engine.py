"""`privfl.PrivacyEngine`: the protection of a site in a training loop of the user's own, alone
or with the other ranks of a communicator.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfl._group_sum import GroupSum
from privfl._rank_group import RankGroup, transport_of
from privfl.accounting import Account, DiscreteGaussian, Event, RenyiFilter
from privfl.admission.plan import limits_of
from privfl.dp.engine import Engine, EngineBackend, LoopFacts
from privfl.errors import InternalError, PrivflError
from privfl.ledger import Ledger, RunFacts
from privfl.noise.distributed import DistributedNoise, Shares, StepGrid
from privfl.noise.randomness import SystemRandomness
from privfl.secagg import Parameters, derive
from privfl.secagg.parameters import MOST_BITS, parameters_for
from privfl.secagg.quantise import WrappingIntegers

# The range of sums is made for so many steps; a loop of one's own does not say how many it will
# make.
_STEPS = 1 << 20
# A rank that does not answer within this time is an error.
_SECONDS = 600.0


class PrivacyEngine(Engine):
    """Opacus' ``PrivacyEngine`` with a ledger, sound sampling and system randomness; with
    ``comm`` every step is a secure sum over all ranks.

    Example:
        >>> engine = privfl.PrivacyEngine(site="zurich", comm=MPI.COMM_WORLD, ledger="z.ledger")
        >>> model, optimizer, loader = engine.make_private(
        ...     module=model,
        ...     optimizer=optimizer,
        ...     data_loader=loader,
        ...     noise_multiplier=1.1,
        ...     max_grad_norm=1.0,
        ... )

    An engine serves one training run.

    With ``comm`` every rank is a site; rank 0 also adds, and holds the key like all others: what
    any ``collusion`` ranks pool shows them only sums with at least the noise that is accounted for.
    All ranks start from the same parameters and make the same number of steps. Nothing is ever
    refunded in a loop of the user's own.

    Args:
        site: whose records these are; the name in the ledger.
        comm: an mpi4py communicator of at least ``collusion`` + 2 ranks, or a privfl transport;
            None to train alone.
        ledger: the file of this site's ledger, which is begun where there is none. Every step is
            charged there before it is made.
        budget: (epsilon, delta) that a ledger begun here may spend; an existing one keeps its own.
        collusion: how many ranks may pool what they see.

    Raises:
        PrivflError: arguments that do not fit, or a ledger that cannot be used.
    """

    def __init__(
        self,
        *,
        site: str,
        comm: Any = None,
        ledger: str | os.PathLike[str] | None = None,
        budget: tuple[float, float] | None = None,
        collusion: int = 1,
    ) -> None:
        if budget is not None and ledger is None:
            raise PrivflError(
                "PrivacyEngine has a budget but no ledger to keep it in; name a file as ledger"
            )
        if budget is not None and not (isinstance(budget, tuple | list) and len(budget) == 2):
            raise PrivflError(f"PrivacyEngine's budget must be (epsilon, delta), got {budget!r}")
        engine_ledger = _EngineLedger(site, None if ledger is None else Path(ledger), budget)
        backend: EngineBackend = (
            _LocalBackend(engine_ledger)
            if comm is None
            else _CommBackend(engine_ledger, comm, collusion)
        )
        super().__init__(backend, SystemRandomness())
        self._ledger = engine_ledger

    def close(self) -> None:
        """Close the ledger, for another program to use."""
        self._ledger.close()


class _EngineLedger:
    """The ledger of an engine, if it has one; opened when the first run begins."""

    def __init__(self, site: str, path: Path | None, budget: tuple[float, float] | None) -> None:
        self.site, self._path, self._budget = site, path, budget
        self._ledger: Ledger | None = None
        self._run, self._steps, self._closed = "", 0, False

    def begin(self, facts: RunFacts, plan: Event) -> None:
        if self._run or self._closed:
            raise PrivflError(
                "an engine serves one training run, and this one has had it; close() it and make "
                "another"
            )
        run = os.urandom(16).hex()
        if self._path is not None:
            ledger = Ledger.write(self._path, self.site, self._limits(plan))
            self._check_budget(ledger)
            ledger.begin_run(run, facts.to_dict())
            self._ledger = ledger
        self._run = run

    def admits_plan(self, delta: float) -> Callable[[Event], bool]:
        """Whether what is left of the budget admits a plan."""
        begun: tuple[RenyiFilter | None, Any] | None = None
        if self._path is not None and self._path.exists():
            with Ledger.read(self._path) as ledger:
                begun = ledger.filters.get("training"), ledger.spent("training")

        def admits(plan: Event) -> bool:
            limit = begun[0] if begun else self._limits(plan).get("training")
            if limit is None:
                return True
            if delta > limit.delta:
                raise PrivflError(
                    f"target_delta {delta:g} is above the {limit.delta:g} of the ledger's budget; "
                    f"use that or a smaller one"
                )
            return limit.admits_plan((begun[1] if begun else limit.nothing()) + limit.cost(plan))

        return admits

    def _check_budget(self, ledger: Ledger) -> None:
        """A ledger has the budget it was begun with."""
        has = {(f.epsilon, f.delta) for f in ledger.filters.values()}
        if self._budget is not None and has != {(float(self._budget[0]), float(self._budget[1]))}:
            ledger.close()
            own = " and ".join(f"({epsilon:g}, {delta:g})" for epsilon, delta in has)
            raise PrivflError(
                f"the ledger {self._path} was begun with "
                f"{f'the budget {own}' if own else 'no budget'}, not with {self._budget}: a budget "
                f"cannot be "
                "changed; leave budget out, or begin a new ledger and add both budgets up"
            )

    def _limits(self, plan: Event) -> Mapping[Account, RenyiFilter]:
        if self._budget is None:
            return {}
        try:
            return limits_of(*self._budget, plan)
        except (ValueError, TypeError) as error:
            raise PrivflError(
                f"PrivacyEngine's budget must be (epsilon, delta): {error}"
            ) from error

    def charge(self, event: Event) -> None:
        """Debit one step; once this returns it stays, whatever happens."""
        if self._closed:
            raise PrivflError(
                "this engine was closed: a step could not be charged to its ledger any more"
            )
        self._steps += 1
        if self._ledger is not None:
            self._ledger.make_final(self._ledger.charge("training", event, self._run, self._steps))

    def close(self) -> None:
        self._closed = True
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None


def _facts(
    members: Sequence[str], collusion: int, model: str, data: str, delta: float, plan: Event
) -> RunFacts:
    """What a report reads about a run."""
    return RunFacts(
        experiment="",
        model=model,
        data=data,
        rounds=plan.steps,
        noise="distributed" if collusion else "site",
        collusion=collusion,
        delta=delta,
        target_epsilon=None,
        private=True,
        plans={"training": plan},
        exact_metrics=(),
        outside=(),
        records_per_person=1,
        identity="",
        pinned=False,
        kept=True,
        members=dict.fromkeys(members, ""),
        coordinator=False,
    )


class _LedgerBackend:
    """What an engine's ledger answers, whoever takes part."""

    def __init__(self, ledger: _EngineLedger) -> None:
        self._ledger = ledger

    def admits_plan(self, delta: float) -> Callable[[Event], bool]:
        return self._ledger.admits_plan(delta)

    def charge(self, event: Event) -> None:
        self._ledger.charge(event)


class _LocalBackend(_LedgerBackend):
    """No other sites: every step gets all of its noise here."""

    shared = False

    def abort_peers(self, error: BaseException) -> None:
        """Nobody waits."""

    def agree(self, loop: LoopFacts) -> LoopFacts:
        return loop

    def begin(
        self,
        loop: LoopFacts,
        model: str,
        data: str,
        delta: float,
        plan: Event,
        max_grad_norm: float,
    ) -> Event:
        self._ledger.begin(_facts([self._ledger.site], 0, model, data, delta, plan), plan)
        return plan

    def sum(self, total: NDArray[np.float64], replica: bytes) -> NDArray[np.float64]:
        raise InternalError("an engine without other sites was to make a sum over sites")


class _CommBackend(_LedgerBackend):
    """The ranks of a communicator: every step is a secure sum, and this site adds its share of
    the noise.
    """

    shared = True

    def __init__(self, ledger: _EngineLedger, comm: Any, collusion: int) -> None:
        super().__init__(ledger)
        self._group, self._collusion = RankGroup(transport_of(comm), _SECONDS), collusion
        self._sums = self._join(None)
        members = self._group.size
        if not 1 <= collusion <= members - 2:
            raise PrivflError(
                f"collusion {collusion} of {members} ranks cannot be withstood: it must be at "
                f"least 1 and at most {members - 2} "
                "(ranks less two)"
            )

    def _join(self, value_bits: int | None) -> GroupSum:
        arguments = json.dumps(["privfl steps 1", self._group.size, value_bits])
        session = self._group.join(
            arguments, lambda: parameters_for(self._group.size, value_bits, "star")
        )
        return GroupSum(self._group, session, "star")

    def abort_peers(self, error: BaseException) -> None:
        text = (
            str(error) if isinstance(error, PrivflError) else f"{type(error).__name__} was raised"
        )
        with contextlib.suppress(PrivflError):  # which says the same
            self._group.all_well(text)

    def agree(self, loop: LoopFacts) -> LoopFacts:
        self._group.all_well()
        self._names = self._group.tell(self._ledger.site)
        if len(set(self._names)) < len(self._names):
            raise PrivflError(
                f"every rank must have a site of its own, but they are {', '.join(self._names)}"
            )
        self._loops = [
            LoopFacts(**json.loads(text)) for text in self._group.tell(json.dumps(loop.__dict__))
        ]
        if len({other.parameters for other in self._loops}) > 1:
            counts = ", ".join(str(other.parameters) for other in self._loops)
            raise PrivflError(
                f"the model has another number of trainable parameters at some ranks ({counts})"
            )
        if len({other.constants for other in self._loops}) > 1:
            raise PrivflError(
                "what is not trained in the model (frozen parameters, buffers) is not the same at "
                "all ranks"
            )
        return replace(
            loop,
            steps=max(other.steps for other in self._loops),
            expected=sum(other.expected for other in self._loops),
        )

    def begin(
        self,
        loop: LoopFacts,
        model: str,
        data: str,
        delta: float,
        plan: Event,
        max_grad_norm: float,
    ) -> Event:
        assert isinstance(plan, DiscreteGaussian)
        # A rank that found no noise for the steps that were agreed on says so here.
        self._group.all_well()
        own = json.dumps([plan.noise_multiplier, max_grad_norm, self._collusion])
        arguments = [json.loads(text) for text in self._group.tell(own)]
        if len({tuple(others[1:]) for others in arguments}) > 1:
            raise PrivflError("max_grad_norm and collusion must be the same at all ranks")
        plan = replace(plan, noise_multiplier=max(others[0] for others in arguments))
        grid = self._grid(
            loop,
            DistributedNoise(
                plan.noise_multiplier, max_grad_norm, self._group.size, self._collusion
            ),
        )
        grid.check_charged(plan.sensitivity)
        self._shares, self._step = Shares(grid, SystemRandomness()), grid.step
        try:
            self._ledger.begin(_facts(self._names, self._collusion, model, data, delta, plan), plan)
        except Exception as error:
            self.abort_peers(error)
            raise
        self._group.all_well()
        return plan

    def _grid(self, loop: LoopFacts, noise: DistributedNoise) -> StepGrid:
        """The grid of the sums, with one value in a word where two are too coarse."""

        def grid(parameters: Parameters) -> StepGrid:
            return noise.grid(
                value_range=None,
                largest_total=parameters.largest_total,
                parameters=loop.parameters,
                expected=loop.expected,
                records=sum(other.records for other in self._loops),
                steps=_STEPS,
            )

        try:
            return grid(self._sums.parameters)
        except PrivflError:
            finer = grid(derive(self._group.size, MOST_BITS))
            self._sums = self._join(MOST_BITS)
            return finer

    def sum(self, total: NDArray[np.float64], replica: bytes) -> NDArray[np.float64]:
        digest = hashlib.sha256(replica).hexdigest()
        integers = self._sums.sum(lambda: self._shares.add(total), WrappingIntegers(), digest)
        return np.asarray(integers * self._step, dtype=np.float64)
