"""What an engine stands on: a ledger, and perhaps the other sites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from privfl.accounting import DiscreteGaussian, Event, PoissonGaussian

# One step, or several alike: with all noise at this site, or as a sum over sites.
Steps = PoissonGaussian | DiscreteGaussian


@dataclass(frozen=True)
class LoopFacts:
    """What is public about a training loop.

    Attributes:
        records: how many records the site has.
        sampling_rate: the probability with which each of them enters a batch.
        steps: how many steps a pass over the loader has.
        parameters: how many parameters are trained.
        constants: a digest of everything in the model that is not trained.
        expected: records of all sites together that take part in a step, on average.
    """

    records: int
    sampling_rate: float
    steps: int
    parameters: int
    constants: str
    expected: float


class EngineBackend(Protocol):
    """Where an engine's steps are charged, and where the other sites are.

    Attributes:
        shared: whether a step is a sum over several sites, each of which adds a share of the noise.
    """

    shared: bool

    def abort_peers(self, error: BaseException) -> None:
        """Tell the other sites, where there are any, that this one cannot go on.

        The sentence of a PrivflError reaches them; of anything else only its type, because its text
        may quote records.
        """
        ...

    def admits_plan(self, delta: float) -> Callable[[Event], bool]:
        """Whether what is left of the budget admits all of a plan, as a function of the plan.

        Args:
            delta: the delta at which the run's epsilon is to be given.

        Raises:
            PrivflError: If the budget is at a smaller delta than ``delta``; the returned function
                raises it.
        """
        ...

    def agree(self, loop: LoopFacts) -> LoopFacts:
        """The loop as all sites run it: a pass has the same number of steps everywhere.

        Raises:
            PrivflError: At all sites, if their models differ or one of them cannot go on.
        """
        ...

    def begin(
        self,
        loop: LoopFacts,
        model: str,
        data: str,
        delta: float,
        plan: Steps,
        max_grad_norm: float,
    ) -> Steps:
        """Write into the ledger that a run begins.

        Args:
            loop: the loop on which the sites have agreed.
            model, data: the types of the module and of the data set, for a reader of the ledger.
            delta: the delta at which the run's epsilon is given.
            plan: all steps that the run is meant to have, of no steps if that is not known.
            max_grad_norm: the clipping norm.

        Returns:
            The plan with the noise on which the sites have agreed.

        Raises:
            PrivflError: At all sites, if they differ in what must be alike, or a ledger cannot be
                written.
        """
        ...

    def charge(self, event: Event) -> None:
        """Debit one step, before anything is made of it.

        Raises:
            BudgetError: If the budget does not admit the step.
            PrivflError: If the ledger was closed or cannot be written.
        """
        ...

    def sum(self, total: NDArray[np.float64], replica: bytes) -> NDArray[np.float64]:
        """The sum over all sites, with the noise in it.

        Args:
            total: this site's sum of clipped gradients, shape (parameters,).
            replica: the trained parameters before this step, which must be the same at all sites.

        Returns:
            The noisy sum, shape (parameters,).

        Raises:
            PrivflError: At all sites, if one of them cannot go on; the charge stays.
        """
        ...
