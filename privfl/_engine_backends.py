"""What a PrivacyEngine stands on: the ledger of its site, and the site alone or the ranks of a
communicator.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from privfl._group_sum import GroupSum
from privfl._rank_group import RankGroup
from privfl.accounting import Account, DiscreteGaussian, Event, RenyiFilter
from privfl.admission.plan import limits_of
from privfl.dp.engine_backend import LoopFacts, Steps
from privfl.errors import InternalError, PrivflError
from privfl.ledger import Ledger, RunFacts
from privfl.noise.distributed import DistributedNoise, Shares, StepGrid
from privfl.noise.randomness import SystemRandomness
from privfl.secagg import Parameters, derive
from privfl.secagg.parameters import MOST_BITS, parameters_for
from privfl.secagg.quantise import WrappingIntegers

# The range of sums is made for so many steps; a loop of the user's own does not say how many it
# will make.
_MOST_STEPS = 1 << 20


class EngineLedger:
    """The ledger of an engine, if it has one; opened when the run begins.

    Attributes:
        site: whose records these are.
        path: the file; None without a ledger.
        delta: the delta at which the run's epsilon is given; None before it begins.
        closed: whether nothing can be charged any more.
    """

    def __init__(
        self,
        site: str,
        path: str | os.PathLike[str] | None,
        budget: tuple[float, float] | None,
    ) -> None:
        self.site, self.path = site, None if path is None else Path(path)
        self.delta: float | None = None
        self.closed = False
        self._budget = None if budget is None else (float(budget[0]), float(budget[1]))
        self._ledger: Ledger | None = None
        self._run, self._steps = "", 0

    def begin(self, facts: RunFacts, plan: Event) -> None:
        """Write that the run begins, into a ledger that is begun if there is none.

        Raises:
            PrivflError: If this engine has had its run, or the ledger cannot be used or has another
                budget.
        """
        if self._run or self.closed:
            raise PrivflError(
                "an engine serves one training run, and this one has had it; close() it and make "
                "another"
            )
        run = os.urandom(16).hex()
        if self.path is not None:
            ledger = Ledger.write(self.path, self.site, self._limits(plan))
            try:
                self._check_budget(ledger)
                ledger.begin_run(run, facts.to_dict())
            except BaseException:
                ledger.close()
                raise
            self._ledger = ledger
        self._run, self.delta = run, facts.delta

    def admits_plan(self, delta: float) -> Callable[[Event], bool]:
        """As :meth:`EngineBackend.admits_plan`."""
        begun = None if self.path is None else Ledger.look(self.path)
        limit, spent = None, None
        if begun is not None:
            with begun:
                limit = begun.filters.get("training")
                spent = None if limit is None else begun.spent("training")

        def admits(plan: Event) -> bool:
            budget = limit if begun is not None else self._limits(plan).get("training")
            if budget is None:
                return True
            if delta > budget.delta:
                raise PrivflError(
                    f"target_delta {delta:g} is above the {budget.delta:g} of the ledger's budget; "
                    "use that or a smaller one"
                )
            before = budget.nothing() if spent is None else spent
            return budget.admits_plan(before + budget.cost(plan))

        return admits

    def _check_budget(self, ledger: Ledger) -> None:
        """A ledger keeps the budget it was begun with."""
        budgets = {(f.epsilon, f.delta) for f in ledger.filters.values()}
        if self._budget is not None and budgets != {self._budget}:
            own = " and ".join(f"({epsilon:g}, {delta:g})" for epsilon, delta in budgets)
            raise PrivflError(
                f"the ledger {self.path} was begun with "
                f"{f'the budget {own}' if own else 'no budget'}, not with {self._budget}: a budget "
                "cannot be changed; leave budget out, or begin a new ledger and add both budgets up"
            )

    def _limits(self, plan: Event) -> Mapping[Account, RenyiFilter]:
        return {} if self._budget is None else limits_of(*self._budget, plan)

    def charge(self, event: Event) -> None:
        """Debit one step; once this returns it stays, whatever happens.

        Raises:
            BudgetError: If the budget does not admit the step.
            PrivflError: If this engine was closed, or the ledger cannot be written.
        """
        if self.closed:
            raise PrivflError(
                "this engine was closed: a step could not be charged to its ledger any more"
            )
        self._steps += 1
        if self._ledger is not None:
            self._ledger.make_final(self._ledger.charge("training", event, self._run, self._steps))

    def close(self) -> None:
        """Let another program have the ledger."""
        self.closed = True
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None


def _run_facts(
    members: Sequence[str], collusion: int, model: str, data: str, delta: float, plan: Event
) -> RunFacts:
    """What a report reads about a run of a training loop of the user's own."""
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
    """What the ledger alone answers, whoever takes part."""

    def __init__(self, ledger: EngineLedger) -> None:
        self._ledger = ledger

    def admits_plan(self, delta: float) -> Callable[[Event], bool]:
        return self._ledger.admits_plan(delta)

    def charge(self, event: Event) -> None:
        self._ledger.charge(event)


class LocalBackend(_LedgerBackend):
    """One site: every step gets all of its noise here, and no other site waits."""

    shared = False

    def abort_peers(self, error: BaseException) -> None:
        """No other site waits."""

    def agree(self, loop: LoopFacts) -> LoopFacts:
        return loop

    def begin(
        self,
        loop: LoopFacts,
        model: str,
        data: str,
        delta: float,
        plan: Steps,
        max_grad_norm: float,
    ) -> Steps:
        self._ledger.begin(_run_facts([self._ledger.site], 0, model, data, delta, plan), plan)
        return plan

    def sum(self, total: NDArray[np.float64], replica: bytes) -> NDArray[np.float64]:
        raise InternalError("an engine without other sites was to make a sum over sites")


class CommBackend(_LedgerBackend):
    """The ranks of a communicator: every step is a secure sum, and this site adds its share of
    the noise.
    """

    shared = True

    def __init__(
        self, ledger: EngineLedger, group: RankGroup, sums: GroupSum, collusion: int
    ) -> None:
        super().__init__(ledger)
        self._group, self._sums, self._collusion = group, sums, collusion
        self._names: tuple[str, ...] = ()
        self._loops: list[LoopFacts] = []

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
        plan: Steps,
        max_grad_norm: float,
    ) -> Steps:
        assert isinstance(plan, DiscreteGaussian)
        # A rank whose target no noise reaches in the steps that were agreed on says so here.
        self._group.all_well()
        own = json.dumps([plan.noise_multiplier, max_grad_norm, self._collusion])
        arguments = [json.loads(text) for text in self._group.tell(own)]
        if len({tuple(rest) for _, *rest in arguments}) > 1:
            raise PrivflError("max_grad_norm and collusion must be the same at all ranks")
        plan = replace(plan, noise_multiplier=max(sigma for sigma, *_ in arguments))
        noise = DistributedNoise(
            plan.noise_multiplier, max_grad_norm, self._group.size, self._collusion
        )
        grid = self._grid(loop, noise)
        grid.check_charged(plan.sensitivity)
        self._shares, self._step = Shares(grid, SystemRandomness()), grid.step
        try:
            self._ledger.begin(
                _run_facts(self._names, self._collusion, model, data, delta, plan), plan
            )
        except Exception as error:
            self.abort_peers(error)
            raise
        self._group.all_well()
        return plan

    def _grid(self, loop: LoopFacts, noise: DistributedNoise) -> StepGrid:
        """The grid of the sums; if it is too coarse with two values in a word, that of one, for
        which the ranks exchange keys again.
        """

        def grid(parameters: Parameters) -> StepGrid:
            return noise.grid(
                value_range=None,
                largest_total=parameters.largest_total,
                parameters=loop.parameters,
                expected=loop.expected,
                records=sum(other.records for other in self._loops),
                steps=_MOST_STEPS,
            )

        try:
            return grid(self._sums.parameters)
        except PrivflError:
            finer = grid(derive(self._group.size, MOST_BITS))
            self._sums = join_steps(self._group, MOST_BITS)
            return finer

    def sum(self, total: NDArray[np.float64], replica: bytes) -> NDArray[np.float64]:
        digest = hashlib.sha256(replica).hexdigest()
        integers = self._sums.sum(lambda: self._shares.add(total), WrappingIntegers(), digest)
        return np.asarray(integers * self._step, dtype=np.float64)


def join_steps(group: RankGroup, value_bits: int | None, problem: str = "") -> GroupSum:
    """The sums of steps, once all ranks have exchanged keys.

    Raises:
        PrivflError: At all ranks, if one of them has a ``problem``.
    """

    def choose() -> Parameters:
        if problem:
            raise PrivflError(problem)
        return parameters_for(group.size, value_bits, "star")

    arguments = json.dumps(["privfl steps 1", group.size, value_bits])
    return GroupSum(group, group.join(arguments, choose), "star")
