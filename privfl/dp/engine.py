"""Opacus' PrivacyEngine with sound sampling, noise from the operating system, a ledger, and sums
over sites.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, overload

import opacus
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from privfl.dp.accountant import EventAccountant
from privfl.dp.checks import check_model, wrapping
from privfl.dp.engine_arguments import (
    Criterion,
    LoopArguments,
    check_kind,
    delta_of,
    epochs_of,
    noise_of,
    positive_number,
    usual_delta,
)
from privfl.dp.engine_backend import EngineBackend, LoopFacts
from privfl.dp.engine_steps import PrivateSteps, least_noise, step_event
from privfl.dp.ghost import GhostModule
from privfl.errors import PrivflError, words_checked
from privfl.noise.randomness import Randomness

_TARGET = "it belongs to make_private_with_epsilon"
_words_checked = functools.partial(
    words_checked, lambda engine, _, problem: engine._backend.abort_peers(problem)
)


class Engine(opacus.PrivacyEngine):  # type: ignore[misc]
    """Opacus' engine on an :class:`EngineBackend`.

    Args:
        backend: where steps are charged, and where the other sites are.
        randomness: where batches, and the noise of a site alone, are drawn from.
    """

    def __init__(self, backend: EngineBackend, randomness: Randomness) -> None:
        # Not Opacus' own __init__: it would warn of randomness that is not used here, and of a
        # secure mode that has been dead since torch 1.8.
        self.accountant = EventAccountant()
        self.secure_mode, self.secure_rng, self.dataset = False, None, None
        self._backend, self._randomness = backend, randomness

    @overload
    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        criterion: Criterion | None = None,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float,
        batch_first: bool = True,
        loss_reduction: Literal["mean", "sum"] = "mean",
        poisson_sampling: bool = True,
        clipping: Literal["flat"] = "flat",
        noise_generator: None = None,
        grad_sample_mode: Literal["hooks", "functorch"] = "hooks",
        wrap_model: Literal[True] = True,
        rand_on_empty: bool = False,
    ) -> tuple[GradSampleModule, DPOptimizer, DataLoader[Any]]: ...

    @overload
    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        criterion: Criterion | None = None,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float,
        batch_first: bool = True,
        loss_reduction: Literal["mean", "sum"] = "mean",
        poisson_sampling: bool = True,
        clipping: Literal["flat"] = "flat",
        noise_generator: None = None,
        grad_sample_mode: Literal["ghost"],
        wrap_model: Literal[True] = True,
        rand_on_empty: bool = False,
    ) -> tuple[GhostModule, DPOptimizer, Criterion, DataLoader[Any]]: ...

    @overload
    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        criterion: Criterion | None = None,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float,
        batch_first: bool = True,
        loss_reduction: Literal["mean", "sum"] = "mean",
        poisson_sampling: bool = True,
        clipping: Literal["flat"] = "flat",
        noise_generator: None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
    ) -> tuple[Any, ...]: ...

    @_words_checked(absent=dict.fromkeys(("target_epsilon", "target_delta", "epochs"), _TARGET))
    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        criterion: Criterion | None = None,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
    ) -> tuple[Any, ...]:
        """Make a training loop private: use what is returned in place of what was handed over.

        As Opacus' ``make_private``, with the same arguments. With other sites this is collective,
        as is every ``optimizer.step()``.

        Guarantee: After any steps the model is (``get_epsilon(delta)``, delta)-differentially
            private for one record of this site, added or removed, if a batch's loss is the sum or
            mean of losses of one record each, its noise does not depend on earlier results, and
            the model changes by ``optimizer.step()`` only.

        Args:
            module: the model, on its device; its trainable parameters are float32.
            optimizer: any torch optimizer of all trainable parameters of ``module``.
            criterion: the loss, returned as it is with ghost clipping and not used otherwise; by
                default ``torch.nn.CrossEntropyLoss()``.
            data_loader: over a data set with ``len()`` and ``[index]``; its batch size is the
                expected size of Poisson batches, so the sampling rate is batch size / records.
            noise_multiplier: standard deviation of the noise in units of ``max_grad_norm``, from
                0.01 to 16384. With other sites, the noise of the sum that ``collusion`` of them
                cannot subtract; of unlike numbers the largest is used.
            max_grad_norm: C, to which the gradient of each record is clipped.
            batch_first: whether the batch is the first dimension of the inputs, or the second.
            loss_reduction: whether the loss is the ``mean`` or the ``sum`` of a batch's losses.
            poisson_sampling: only True. Shuffled batches cost far more than the accounting of
                Poisson batches says.
            clipping: only ``flat``. The noise of other ways to clip is not accounted for.
            noise_generator: only None: noise comes from the operating system. Whoever knows the
                seed of a generator can take its noise away.
            grad_sample_mode: ``hooks`` or ``functorch`` make the gradient of every record;
                ``ghost`` makes only their norms, in less memory, in one backward pass.
            wrap_model: False to hook into ``module`` instead of wrapping it; not with ghost
                clipping.
            rand_on_empty: only False. A made-up record in place of an empty batch doubles what one
                record can change.

        Returns:
            (module, optimizer, data_loader), and with ``grad_sample_mode="ghost"`` (module,
            optimizer, criterion, data_loader). With ``wrap_model=False`` the first is Opacus'
            ``GradSampleHooks``, and ``module`` itself is the model.

        Raises:
            PrivflError: If an argument, the model or the loader would break the guarantee, the
                ledger cannot be used, or another site cannot go on.
            TypeError: If an argument is unknown or missing.
        """
        arguments = LoopArguments(
            module=module,
            optimizer=optimizer,
            data_loader=data_loader,
            max_grad_norm=max_grad_norm,
            criterion=nn.CrossEntropyLoss() if criterion is None else criterion,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            poisson_sampling=poisson_sampling,
            clipping=clipping,
            noise_generator=noise_generator,
            grad_sample_mode=grad_sample_mode,
            wrap_model=wrap_model,
            rand_on_empty=rand_on_empty,
        )
        return self._make(arguments, lambda _: noise_of(noise_multiplier))

    @overload
    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        criterion: Criterion | None = None,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float,
        batch_first: bool = True,
        loss_reduction: Literal["mean", "sum"] = "mean",
        poisson_sampling: bool = True,
        clipping: Literal["flat"] = "flat",
        noise_generator: None = None,
        grad_sample_mode: Literal["hooks", "functorch"] = "hooks",
        wrap_model: Literal[True] = True,
    ) -> tuple[GradSampleModule, DPOptimizer, DataLoader[Any]]: ...

    @overload
    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        criterion: Criterion | None = None,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float,
        batch_first: bool = True,
        loss_reduction: Literal["mean", "sum"] = "mean",
        poisson_sampling: bool = True,
        clipping: Literal["flat"] = "flat",
        noise_generator: None = None,
        grad_sample_mode: Literal["ghost"],
        wrap_model: Literal[True] = True,
    ) -> tuple[GhostModule, DPOptimizer, Criterion, DataLoader[Any]]: ...

    @overload
    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        criterion: Criterion | None = None,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float,
        batch_first: bool = True,
        loss_reduction: Literal["mean", "sum"] = "mean",
        poisson_sampling: bool = True,
        clipping: Literal["flat"] = "flat",
        noise_generator: None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
    ) -> tuple[Any, ...]: ...

    @_words_checked(absent={"noise_multiplier": "it chooses the least that is enough"})
    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        criterion: Criterion | None = None,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
    ) -> tuple[Any, ...]:
        """As :meth:`make_private`, with the least noise that keeps ``epochs`` passes over the
        loader within (target_epsilon, target_delta).

        If the ledger has a budget, also within what is left of it.

        Guarantee: As :meth:`make_private`. ``epochs`` passes spend at most ``target_epsilon`` at
            ``target_delta``; more passes are not prevented, and spend more.

        Args:
            module, optimizer, criterion, data_loader: as in :meth:`make_private`.
            target_epsilon: the epsilon that all passes together may spend.
            target_delta: the delta of that epsilon; not above that of the ledger's budget.
            epochs: how many passes over the loader will be made.
            max_grad_norm, batch_first, loss_reduction, clipping: as in :meth:`make_private`.
            poisson_sampling, noise_generator, grad_sample_mode, wrap_model: as there.

        Returns:
            As :meth:`make_private`.

        Raises:
            PrivflError: As :meth:`make_private`; also if no noise is enough for the target, or for
                what is left of the budget.
            TypeError: If an argument is unknown or missing.
        """
        arguments = LoopArguments(
            module=module,
            optimizer=optimizer,
            data_loader=data_loader,
            max_grad_norm=max_grad_norm,
            criterion=nn.CrossEntropyLoss() if criterion is None else criterion,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            poisson_sampling=poisson_sampling,
            clipping=clipping,
            noise_generator=noise_generator,
            grad_sample_mode=grad_sample_mode,
            wrap_model=wrap_model,
            rand_on_empty=False,
        )

        def noise(loop: LoopFacts) -> float:
            return least_noise(self._backend, loop, epsilon, delta, passes)

        with self._peers_told():
            epsilon = positive_number("target_epsilon", target_epsilon)
            delta = delta_of("target_delta", target_delta)
            passes = epochs_of(epochs)
        return self._make(arguments, noise, delta=delta, epochs=passes)

    def _make(
        self,
        arguments: LoopArguments,
        noise: Callable[[LoopFacts], float],
        *,
        delta: float | None = None,
        epochs: int = 0,
    ) -> tuple[Any, ...]:
        """What ``make_private`` returns, with the noise that a loop needs."""
        with self._peers_told():
            arguments.check()
            own, untrained = arguments.loop()
            sigma = noise(own)
            wrapped = self._wrap(arguments)
        loop = self._backend.agree(own)
        with self._peers_told():
            # Another site may need more steps for a pass; everything else that the noise depends on
            # is this site's own.
            sigma = sigma if loop.steps == own.steps else noise(loop)
        step = step_event(loop, sigma, shared=self._backend.shared)
        event = self._backend.begin(
            loop,
            type(arguments.model).__name__,
            type(arguments.data_loader.dataset).__name__,
            delta or usual_delta(loop.records),
            step.times(epochs * loop.steps),
            arguments.clipping_norm,
        ).once()
        with self._peers_told():
            wrapped.forbid_grad_accumulation()
            steps = PrivateSteps(
                self._backend,
                self.accountant,
                self._randomness,
                arguments,
                loop,
                untrained,
                event,
                wrapped,
            )
        if arguments.ghost:
            # As Opacus returns it. One backward pass is enough here, so any criterion will do.
            return wrapped, steps.optimizer, arguments.criterion, steps.loader
        return wrapped, steps.optimizer, steps.loader

    @contextlib.contextmanager
    def _peers_told(self) -> Iterator[None]:
        """What is raised here ends the call at the other sites too, which would wait."""
        try:
            yield
        except Exception as error:
            self._backend.abort_peers(error)
            raise

    def _wrap(self, arguments: LoopArguments) -> Any:
        """The module that makes gradients of single examples, or what ghost clipping needs."""
        common: dict[str, Any] = {
            "batch_first": arguments.batch_first,
            "loss_reduction": arguments.loss_reduction,
        }
        with wrapping("module"):
            if not arguments.ghost:
                return self._prepare_model(
                    arguments.module,
                    **common,
                    grad_sample_mode=arguments.grad_sample_mode,
                    wrap_model=arguments.wrap_model,
                )
            if isinstance(arguments.module, GhostModule):
                return arguments.module
            return GhostModule(arguments.module, **common)

    def get_epsilon(self, delta: float) -> float:
        """Epsilon at ``delta`` of all steps that this engine made or loaded; 0 before the first.

        An upper bound by Renyi divergences. Steps of earlier engines on the same ledger are not in
        it: `privfl budget show` has all.

        Raises:
            PrivflError: If ``delta`` is not between 0 and 1.
        """
        return self.accountant.get_epsilon(delta_of("delta", delta))

    def is_compatible(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer | None = None,
        data_loader: DataLoader[Any] | None = None,
    ) -> bool:
        """Whether :meth:`make_private` takes the layers of ``module``.

        As in Opacus, ``optimizer`` and ``data_loader`` are not looked at.
        """
        try:
            check_model(getattr(module, "_module", module))
        except PrivflError:
            return False
        return True

    def validate(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer | None = None,
        data_loader: DataLoader[Any] | None = None,
    ) -> None:
        """Say why :meth:`make_private` would not take the layers of ``module``.

        As in Opacus, ``optimizer`` and ``data_loader`` are not looked at.

        Raises:
            PrivflError: If ``module`` is no module, or one of its layers mixes the records of a
                batch or keeps statistics of them.
            opacus.validators.errors.UnsupportedModuleError: If Opacus cannot make gradients of
                single examples for a layer.
        """
        check_kind("module", module, nn.Module)
        super().validate(module=module, optimizer=optimizer, data_loader=data_loader)
        check_model(getattr(module, "_module", module))
