"""Opacus' PrivacyEngine with sound sampling, noise from the operating system, and a place for a
ledger and for sums over sites.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import opacus
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from privfl.accounting import (
    LARGEST_NOISE_MULTIPLIER,
    LEAST_NOISE_MULTIPLIER,
    DiscreteGaussian,
    Event,
    PoissonGaussian,
    epsilon_of,
    least_noise_multiplier,
)
from privfl.dp.accountant import EventAccountant
from privfl.dp.checks import (
    check_constants,
    check_model,
    check_neighbours,
    constants,
    digest_of,
    wrapping,
)
from privfl.dp.ghost import GhostModule
from privfl.dp.optimizer import (
    SecureSumGhostOptimizer,
    SecureSumOptimizer,
    SystemNoiseGhostOptimizer,
    SystemNoiseOptimizer,
)
from privfl.dp.sampling import PoissonBatches, poisson_loader, rate_of
from privfl.errors import PrivflError
from privfl.noise.distributed import SENSITIVITY
from privfl.noise.randomness import Randomness

_MODES = ("hooks", "functorch", "ghost")


@dataclass(frozen=True)
class LoopFacts:
    """What is public about a training loop: ``steps`` is how many a pass over the loader has,
    ``parameters`` how many are trained.

    ``expected``: records of all sites together that take part in a step, on average. ``constants``:
    a digest of all in the model that is not trained.
    """

    records: int
    sampling_rate: float
    steps: int
    parameters: int
    constants: str
    expected: float


class EngineBackend(Protocol):
    """Where an engine's steps are written down, and where the other sites are."""

    shared: bool

    def abort_peers(self, error: BaseException) -> None:
        """Let the other sites know that this one cannot go on, where they would wait for it."""
        ...

    def admits_plan(self, delta: float) -> Callable[[Event], bool]:
        """Whether what is left of the budget admits a plan, all of it; runs are reported at
        ``delta``.

        Raises:
            PrivflError: the budget is at a smaller delta.
        """
        ...

    def agree(self, loop: LoopFacts) -> LoopFacts:
        """The loop as all sites run it: a pass must have the same number of steps everywhere."""
        ...

    def begin(
        self,
        loop: LoopFacts,
        model: str,
        data: str,
        delta: float,
        plan: Event,
        max_grad_norm: float,
    ) -> Event:
        """Write down that a run begins; the plan with the noise on which the sites agree."""
        ...

    def charge(self, event: Event) -> None:
        """Debit one step; when this returns the charge is safe, and only then anything may be
        made of the step.
        """
        ...

    def sum(self, total: NDArray[np.float64], replica: bytes) -> NDArray[np.float64]:
        """The noisy sum over all sites of vectors of shape (parameters,)."""
        ...


class Engine(opacus.PrivacyEngine):  # type: ignore[misc]
    """Opacus' engine at a :class:`EngineBackend`."""

    def __init__(self, backend: EngineBackend, randomness: Randomness) -> None:
        # Not Opacus' own __init__: it would warn of randomness that is not used here, and of a
        # secure mode that has been dead since torch 1.8.
        self.accountant = EventAccountant()
        self.secure_mode, self.secure_rng, self.dataset = False, None, None
        self._backend, self._randomness = backend, randomness

    def make_private(self, *, noise_multiplier: float, **arguments: Any) -> Any:
        """As Opacus' ``make_private``, with the same arguments and results.

        The loader's batch size is the expected size of Poisson batches. With other sites this is
        collective, as every ``optimizer.step()``.

        Raises:
            PrivflError: an argument, the model or the loader would break the guarantee.
        """

        def noise(loop: LoopFacts) -> float:
            _check_noise(noise_multiplier)
            # A number of numpy or torch would not go into the ledger.
            return float(noise_multiplier)

        return self._make(arguments, noise, delta=None)

    def make_private_with_epsilon(
        self, *, target_epsilon: float, target_delta: float, epochs: int, **arguments: Any
    ) -> Any:
        """As Opacus' ``make_private_with_epsilon``: with the least noise that keeps ``epochs``
        passes within (target_epsilon, target_delta).

        And within what is left of the ledger's budget, if it has one.

        Raises:
            PrivflError: as :meth:`make_private`, or no noise is enough.
        """

        def noise(loop: LoopFacts) -> float:
            admits = self._backend.admits_plan(target_delta)

            def spent(sigma: float) -> float:
                plan = self._event(loop, sigma).times(epochs * loop.steps)
                return epsilon_of([plan], target_delta).upper if admits(plan) else float("inf")

            found = least_noise_multiplier(
                lambda sigma: spent(sigma) if sigma >= LEAST_NOISE_MULTIPLIER else float("inf"),
                target_epsilon,
            )
            if found is None:
                raise PrivflError(
                    f"target_epsilon {target_epsilon:g} cannot be reached with {epochs} "
                    f"{'epoch' if epochs == 1 else 'epochs'}, or not with what is "
                    "left of the ledger's budget; raise it, or lower epochs or the batch size"
                )
            return found

        return self._make(arguments, noise, delta=target_delta, epochs=epochs)

    def _event(
        self, loop: LoopFacts, noise_multiplier: float
    ) -> PoissonGaussian | DiscreteGaussian:
        """One step, as it is charged."""
        common: dict[str, Any] = {
            "sampling_rate": loop.sampling_rate,
            "noise_multiplier": noise_multiplier,
        }
        return (
            DiscreteGaussian(**common, sensitivity=SENSITIVITY)
            if self._backend.shared
            else PoissonGaussian(**common)
        )

    def _make(
        self,
        arguments: dict[str, Any],
        noise: Callable[[LoopFacts], float],
        *,
        delta: float | None,
        epochs: int = 0,
    ) -> Any:
        try:
            given = _Arguments(**arguments)
            given.check()
            inner, plain = given.inner_optimizer(), getattr(given.module, "_module", given.module)
            own, untrained = _loop_of(given, plain, inner)
            sigma = noise(own)
            wrapped = self._wrap(given)
        except Exception as error:
            self._backend.abort_peers(error)
            raise
        loop = self._backend.agree(own)
        # Another site may need more steps for a pass; everything else that the noise depends on is
        # this site's own.
        try:
            sigma = sigma if loop.steps == own.steps else noise(loop)
        except Exception as error:
            self._backend.abort_peers(error)
            raise
        plan = self._event(loop, sigma).times(epochs * loop.steps)
        names = (type(plain).__name__, type(given.data_loader.dataset).__name__)
        event = self._backend.begin(
            loop, *names, delta or _usual_delta(loop.records), plan, given.max_grad_norm
        ).once()

        ahead = given.data_loader.num_workers > 0
        batches = PoissonBatches(
            loop.records, loop.sampling_rate, loop.steps, self._randomness, ahead=ahead
        )
        loader = poisson_loader(given.data_loader, batches, given.batch_first)
        wrapped.forbid_grad_accumulation()

        def charge() -> None:
            """All that must hold before anything is made of a step, and its debit."""
            # The optimizer's own numbers are the user's to change (a scheduler may); what is
            # charged is what will be done.
            _check_noise(optimizer.noise_multiplier)
            now = self._event(loop, float(optimizer.noise_multiplier))
            if self._backend.shared and (
                now != event or optimizer.max_grad_norm != given.max_grad_norm
            ):
                raise PrivflError(
                    "noise_multiplier and max_grad_norm were agreed on by all sites and cannot "
                    "change during training"
                )
            batches.use(optimizer.examples_in_step)
            check_constants(plain, untrained)
            self._backend.charge(now)
            self.accountant.add(now)

        optimizer = self._optimizer(given, inner, wrapped, event, loop, charge)

        def forget() -> None:
            if optimizer.has_unused_gradients():
                warnings.warn(
                    "gradients of a batch that no optimizer.step() used were dropped; step once "
                    "for each batch",
                    stacklevel=2,
                )
            optimizer.forget_unfinished_step()
            _forget_forward_passes(plain)

        batches.begun = forget
        if given.grad_sample_mode != "ghost":
            return wrapped, optimizer, loader
        # As Opacus returns it. One backward pass is enough here, so any criterion will do.
        return wrapped, optimizer, given.criterion, loader

    def _wrap(self, given: _Arguments) -> Any:
        common: dict[str, Any] = {
            "batch_first": given.batch_first,
            "loss_reduction": given.loss_reduction,
        }
        with wrapping("module"):
            if given.grad_sample_mode != "ghost":
                return self._prepare_model(
                    given.module,
                    **common,
                    grad_sample_mode=given.grad_sample_mode,
                    wrap_model=given.wrap_model,
                )
            if isinstance(given.module, GhostModule):
                return given.module
            return GhostModule(given.module, **common)

    def _optimizer(
        self,
        given: _Arguments,
        inner: torch.optim.Optimizer,
        wrapped: Any,
        event: Any,
        loop: LoopFacts,
        charge: Callable[[], None],
    ) -> Any:
        ghost = given.grad_sample_mode == "ghost"
        common: dict[str, Any] = {
            "noise_multiplier": event.noise_multiplier,
            "max_grad_norm": given.max_grad_norm,
            "expected_batch_size": loop.sampling_rate * loop.records,
            "loss_reduction": given.loss_reduction,
        } | ({"ghost": wrapped} if ghost else {})
        if not self._backend.shared:
            kind = SystemNoiseGhostOptimizer if ghost else SystemNoiseOptimizer
            return kind(inner, randomness=self._randomness, charge=charge, **common)

        def exchange(total: NDArray[np.float64]) -> NDArray[np.float64]:
            try:
                charge()
            except Exception as error:
                self._backend.abort_peers(error)
                raise
            replica = b"".join(p.detach().cpu().numpy().tobytes() for p in optimizer.params)
            summed = self._backend.sum(total, replica)
            return summed / loop.expected if given.loss_reduction == "mean" else summed

        optimizer = (SecureSumGhostOptimizer if ghost else SecureSumOptimizer)(
            inner, exchange=exchange, abort_peers=self._backend.abort_peers, **common
        )
        return optimizer

    def is_compatible(self, *, module: nn.Module, **arguments: Any) -> bool:
        """Whether :meth:`make_private` takes ``module``."""
        try:
            check_model(getattr(module, "_module", module))
        except PrivflError:
            return False
        return bool(super().is_compatible(module=module, **arguments))

    def validate(self, *, module: nn.Module, **arguments: Any) -> None:
        """Say why :meth:`make_private` would abort_peers ``module``.

        Raises:
            PrivflError, opacus.validators.errors.UnsupportedModuleError: it would.
        """
        super().validate(module=module, **arguments)
        check_model(getattr(module, "_module", module))


@dataclass(frozen=True)
class _Arguments:
    """Opacus' arguments of ``make_private``, with its defaults."""

    module: Any
    optimizer: torch.optim.Optimizer
    data_loader: DataLoader[Any]
    max_grad_norm: float
    criterion: Any = None
    batch_first: bool = True
    loss_reduction: str = "mean"
    poisson_sampling: bool = True
    clipping: str = "flat"
    noise_generator: Any = None
    grad_sample_mode: str = "hooks"
    wrap_model: bool = True
    rand_on_empty: bool = False

    def __post_init__(self) -> None:
        if self.criterion is None:
            object.__setattr__(self, "criterion", nn.CrossEntropyLoss())

    def inner_optimizer(self) -> torch.optim.Optimizer:
        inner: torch.optim.Optimizer = getattr(self.optimizer, "original_optimizer", self.optimizer)
        return inner

    def check(self) -> None:
        """Refuse what Opacus takes and what would break the guarantee."""
        refused = {
            "poisson_sampling=False": (
                not self.poisson_sampling,
                "shuffled batches cost far more than Poisson accounting says; leave it out",
            ),
            "noise_generator": (
                self.noise_generator is not None,
                "whoever knows its seed can take the noise away; leave it out",
            ),
            "rand_on_empty=True": (
                self.rand_on_empty,
                "a made-up record in place of none doubles what a record can change; leave it out",
            ),
            f"clipping={self.clipping!r}": (
                self.clipping != "flat",
                "only 'flat' clipping is accounted for; leave it out",
            ),
            f"grad_sample_mode={self.grad_sample_mode!r}": (
                self.grad_sample_mode not in _MODES,
                f"choose one of {', '.join(_MODES)}",
            ),
            "wrap_model=False": (
                not self.wrap_model and self.grad_sample_mode == "ghost",
                "ghost clipping wraps the model; leave it out",
            ),
        }
        for name, (holds, why) in refused.items():
            if holds:
                raise PrivflError(f"make_private does not take {name}: {why}")
        if (
            isinstance(self.max_grad_norm, bool)
            or not isinstance(self.max_grad_norm, int | float)
            or not 0.0 < self.max_grad_norm < float("inf")
        ):
            raise PrivflError(
                f"max_grad_norm must be one positive number, got {self.max_grad_norm!r}"
            )


def _check_noise(noise_multiplier: float) -> None:
    if not LEAST_NOISE_MULTIPLIER <= noise_multiplier <= LARGEST_NOISE_MULTIPLIER:
        raise PrivflError(
            f"noise_multiplier must be between {LEAST_NOISE_MULTIPLIER:g} and "
            f"{LARGEST_NOISE_MULTIPLIER:g}, got {noise_multiplier}"
        )


def _loop_of(
    given: _Arguments, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[LoopFacts, dict[str, torch.Tensor]]:
    """What is public about the loop, if the model, the loader and the optimizer fit; and all in
    the model that is not trained.
    """
    check_model(model)
    check_neighbours(model, given.data_loader)
    records, rate, steps = rate_of(given.data_loader)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if {id(p) for p in parameters} != {id(p) for p in model.parameters() if p.requires_grad}:
        raise PrivflError(
            "optimizer must have the trainable parameters of module, all of them and no others"
        )
    untrained = constants(model)
    loop = LoopFacts(
        records,
        rate,
        steps,
        sum(p.numel() for p in parameters),
        digest_of(untrained),
        rate * records,
    )
    return loop, untrained


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


def _usual_delta(records: int) -> float:
    """For a report where nobody said which: well below one over the number of records, and a
    power of ten.
    """
    return min(1e-5, 10.0 ** -(len(str(records)) + 1))
