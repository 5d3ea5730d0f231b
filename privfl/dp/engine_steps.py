"""The steps of a user's loop: the noise they need, and the charge before each is made."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from privfl.accounting import (
    DiscreteGaussian,
    PoissonGaussian,
    epsilon_of,
    least_noise_multiplier,
)
from privfl.dp.accountant import EventAccountant
from privfl.dp.checks import check_constants
from privfl.dp.clipping import ExampleClipper
from privfl.dp.engine_arguments import LoopArguments, noise_of
from privfl.dp.engine_backend import EngineBackend, LoopFacts, Steps
from privfl.dp.ghost import GhostClipper
from privfl.dp.optimizer import OwnNoise, Release, SumOptimizer, SumOverSites
from privfl.dp.sampling import PoissonBatches, poisson_loader
from privfl.errors import PrivflError
from privfl.noise.distributed import SENSITIVITY
from privfl.noise.randomness import Randomness


def step_event(loop: LoopFacts, noise_multiplier: float, *, shared: bool) -> Steps:
    """One step as it is charged: of a sum over sites if ``shared``, otherwise of this site's
    own noise.
    """
    if shared:
        return DiscreteGaussian(
            sampling_rate=loop.sampling_rate,
            noise_multiplier=noise_multiplier,
            sensitivity=SENSITIVITY,
        )
    return PoissonGaussian(sampling_rate=loop.sampling_rate, noise_multiplier=noise_multiplier)


def least_noise(
    backend: EngineBackend, loop: LoopFacts, epsilon: float, delta: float, epochs: int
) -> float:
    """The least noise multiplier that keeps ``epochs`` passes within (epsilon, delta), and within
    what is left of the ledger's budget.

    Raises:
        PrivflError: If no noise is enough, or the budget is at a smaller delta.
    """
    admits = backend.admits_plan(delta)

    def spent(sigma: float) -> float:
        plan = step_event(loop, sigma, shared=backend.shared).times(epochs * loop.steps)
        return epsilon_of([plan], delta).upper if admits(plan) else math.inf

    noise_multiplier = least_noise_multiplier(spent, epsilon)
    if noise_multiplier is None:
        raise PrivflError(
            f"target_epsilon {epsilon:g} cannot be reached with {epochs} "
            f"{'epoch' if epochs == 1 else 'epochs'}, or not with what is left of the ledger's "
            "budget; raise it, or lower epochs or the batch size"
        )
    return noise_multiplier


class PrivateSteps:
    """The steps of one run: what must hold before anything is made of one, and its charge.

    Guarantee: The optimizer makes a step only of one whole batch of the loader, once, and only
        after the step was charged with the noise that it will have.

    Args:
        backend: where steps are charged and summed.
        accountant: what counts the steps of this engine.
        randomness: where batches, and this site's own noise, are drawn from.
        arguments: those of ``make_private``, checked.
        loop: the loop on which the sites have agreed.
        untrained: everything in the model that is not trained, by name, as it must stay.
        event: one step, with the noise on which the sites have agreed.
        wrapped: the module that makes gradients of single examples.

    Attributes:
        loader: the user's loader, with Poisson batches.
        optimizer: the user's optimizer, with clipping and noise; each of its steps is charged.
    """

    def __init__(
        self,
        backend: EngineBackend,
        accountant: EventAccountant,
        randomness: Randomness,
        arguments: LoopArguments,
        loop: LoopFacts,
        untrained: dict[str, torch.Tensor],
        event: Steps,
        wrapped: Any,
    ) -> None:
        self._backend, self._accountant, self._arguments = backend, accountant, arguments
        self._loop, self._untrained, self._event = loop, untrained, event
        ahead = arguments.data_loader.num_workers > 0
        self._batches = PoissonBatches(
            loop.records, loop.sampling_rate, loop.steps, randomness, ahead=ahead
        )
        self.loader = poisson_loader(arguments.data_loader, self._batches, arguments.batch_first)
        self.optimizer = self._optimizer(wrapped, randomness)
        self._batches.begun = self.begin_batch

    def _optimizer(self, wrapped: Any, randomness: Randomness) -> SumOptimizer:
        arguments, loop, shared = self._arguments, self._loop, self._backend.shared
        release: Release = OwnNoise(randomness, self._charge)
        if shared:
            release = SumOverSites(self._sum, self._charge, self._backend.abort_peers)
        return SumOptimizer(
            arguments.inner_optimizer,
            clipper=GhostClipper(wrapped) if arguments.ghost else ExampleClipper(exact=shared),
            release=release,
            noise_multiplier=self._event.noise_multiplier,
            max_grad_norm=arguments.clipping_norm,
            expected_batch_size=loop.sampling_rate * loop.records,
            # A sum over sites is divided by the expected batch of all of them, in _sum.
            loss_reduction="sum" if shared else arguments.loss_reduction,
        )

    def _charge(self) -> None:
        """All that must hold before anything is made of a step, and its debit."""
        # The optimizer's own numbers are the user's to change (a scheduler may); what is charged is
        # what will be done.
        optimizer, shared = self.optimizer, self._backend.shared
        event = step_event(self._loop, noise_of(optimizer.noise_multiplier), shared=shared)
        if shared and (
            event != self._event or optimizer.max_grad_norm != self._arguments.clipping_norm
        ):
            raise PrivflError(
                "noise_multiplier and max_grad_norm were agreed on by all sites and cannot change "
                "during training"
            )
        self._batches.use(optimizer.examples_in_step)
        check_constants(self._arguments.model, self._untrained)
        self._backend.charge(event)
        self._accountant.add(event)

    def _sum(self, total: NDArray[np.float64]) -> NDArray[np.float64]:
        """The noisy sum over all sites of a charged step, as the optimizer is to follow it; shape
        (parameters,).
        """
        replica = b"".join(p.detach().cpu().numpy().tobytes() for p in self.optimizer.params)
        summed = self._backend.sum(total, replica)
        mean = self._arguments.loss_reduction == "mean"
        return summed / self._loop.expected if mean else summed

    def begin_batch(self, number: int) -> None:
        """Drop what an interrupted pass left behind, with a warning if no step used its gradients.

        Args:
            number: of the batch that comes next, in its pass.

        Raises:
            PrivflError: If the batch before it in the same pass was not used; at all sites.
        """
        if self.optimizer.has_unused_gradients():
            if number > 0:
                error = PrivflError(
                    "Poisson sampling is not compatible with gradient accumulation over batches: "
                    "call optimizer.step() after every backward pass, or give the loader the "
                    "larger batch size and split its batches with Opacus' BatchMemoryManager"
                )
                self._backend.abort_peers(error)
                raise error
            warnings.warn(
                "gradients of a batch that no optimizer.step() used were dropped, as a new pass "
                "begins",
                stacklevel=2,
            )
        self.optimizer.forget_unfinished_step()
        _forget_forward_passes(self._arguments.model)


def _forget_forward_passes(model: nn.Module) -> None:
    """Drop what Opacus' hooks keep of a forward pass that no backward pass followed; it would be
    taken for the next one's.
    """
    for layer in model.modules():
        layer.__dict__.pop("activations", None)
        layer.__dict__.pop("max_batch_len", None)
    for p in model.parameters():
        if hasattr(p, "_forward_counter"):
            p._forward_counter = 0
