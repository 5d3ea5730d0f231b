"""What a user hands to an engine, checked before anything is made of it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from privfl.accounting import LARGEST_NOISE_MULTIPLIER, LEAST_NOISE_MULTIPLIER
from privfl.dp.checks import check_model, check_neighbours, constants, digest_of
from privfl.dp.engine_backend import LoopFacts
from privfl.dp.sampling import rate_of
from privfl.errors import PrivflError, is_number, shown

Criterion = Callable[..., torch.Tensor]
_MODES = ("hooks", "functorch", "ghost")


def check_kind(name: str, value: Any, kind: type) -> None:
    """Refuse a part of a loop that is something else.

    Raises:
        PrivflError: If ``value`` is no instance of ``kind``; the sentence calls it ``name``.
    """
    if not isinstance(value, kind):
        raise PrivflError(f"{name} must be a torch {kind.__name__}, got {shown(value)}")


def real_number(name: str, value: Any) -> float:
    """``value`` as a float; a number of numpy or torch would not go into a ledger.

    Raises:
        PrivflError: If ``value`` is not one real number; the sentence calls it ``name``.
    """
    scalar = isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0
    if scalar or is_number(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:
            return math.inf
        except (TypeError, ValueError, RuntimeError):
            pass  # an array of something else
    raise PrivflError(f"{name} must be a number, got {shown(value)}")


def positive_number(name: str, value: Any) -> float:
    """``value`` as a float above 0 and not infinite.

    Raises:
        PrivflError: If ``value`` is no such number; the sentence calls it ``name``.
    """
    try:
        number = real_number(name, value)
    except PrivflError:
        number = math.nan
    if not 0.0 < number < math.inf:
        raise PrivflError(f"{name} must be one positive number, got {shown(value)}")
    return number


def noise_of(noise_multiplier: Any) -> float:
    """A noise multiplier as a float.

    Raises:
        PrivflError: If it is no number, or so small or large that it bounds nothing or leaves
            nothing to learn.
    """
    number = real_number("noise_multiplier", noise_multiplier)
    if not LEAST_NOISE_MULTIPLIER <= number <= LARGEST_NOISE_MULTIPLIER:
        raise PrivflError(
            f"noise_multiplier must be between {LEAST_NOISE_MULTIPLIER:g} and "
            f"{LARGEST_NOISE_MULTIPLIER:g}, got {number:g}"
        )
    return number


def delta_of(name: str, value: Any) -> float:
    """A delta as a float.

    Raises:
        PrivflError: If ``value`` is no number between 0 and 1; the sentence calls it ``name``.
    """
    number = real_number(name, value)
    if not 0.0 < number < 1.0:
        raise PrivflError(f"{name} must be between 0 and 1, got {number:g}")
    return number


def epochs_of(epochs: Any) -> int:
    """A number of passes over a loader.

    Raises:
        PrivflError: If it is no whole number above 0.
    """
    if not is_number(epochs, numbers.Integral) or epochs < 1:
        raise PrivflError(f"epochs must be a whole number above 0, got {shown(epochs)}")
    return int(epochs)


def usual_delta(records: int) -> float:
    """The delta of a report where nobody chose one: well below one over the number of records,
    and a power of ten.
    """
    return min(1e-5, 10.0 ** -(len(str(records)) + 1))


@dataclass(frozen=True)
class LoopArguments:
    """The arguments of ``make_private`` that say nothing of the noise."""

    module: Any
    optimizer: Any
    data_loader: Any
    max_grad_norm: Any
    criterion: Criterion
    batch_first: bool
    loss_reduction: str
    poisson_sampling: bool
    clipping: str
    noise_generator: Any
    grad_sample_mode: str
    wrap_model: bool
    rand_on_empty: bool

    @property
    def ghost(self) -> bool:
        """Whether gradients are clipped without being made for each example."""
        return self.grad_sample_mode == "ghost"

    @property
    def model(self) -> nn.Module:
        """The user's own module, without what Opacus wraps around it."""
        model: nn.Module = getattr(self.module, "_module", self.module)
        return model

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """The user's own optimizer, without what an earlier ``make_private`` put around it."""
        inner: torch.optim.Optimizer = getattr(self.optimizer, "original_optimizer", self.optimizer)
        return inner

    @property
    def clipping_norm(self) -> float:
        """``max_grad_norm`` as a float.

        Raises:
            PrivflError: If it is no positive number.
        """
        return positive_number("max_grad_norm", self.max_grad_norm)

    def check(self) -> None:
        """Refuse what is no part of a loop, and what Opacus takes although it would break the
        guarantee.

        Raises:
            PrivflError: If an argument is not taken; the sentence says why.
        """
        self._check_kinds()
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
            f"clipping={shown(self.clipping)}": (
                self.clipping != "flat",
                "only 'flat' clipping is accounted for; leave it out",
            ),
            f"grad_sample_mode={shown(self.grad_sample_mode)}": (
                self.grad_sample_mode not in _MODES,
                f"choose one of {', '.join(_MODES)}",
            ),
            f"loss_reduction={shown(self.loss_reduction)}": (
                self.loss_reduction not in ("mean", "sum"),
                "choose mean or sum, as your criterion does",
            ),
            "wrap_model=False": (
                not self.wrap_model and self.ghost,
                "ghost clipping wraps the model; leave it out",
            ),
        }
        for name, (holds, why) in refused.items():
            if holds:
                raise PrivflError(f"make_private does not take {name}: {why}")

    def _check_kinds(self) -> None:
        check_kind("module", self.module, nn.Module)
        check_kind("optimizer", self.inner_optimizer, torch.optim.Optimizer)
        check_kind("data_loader", self.data_loader, DataLoader)
        if not callable(self.criterion):
            raise PrivflError(f"criterion must be a loss function, got {shown(self.criterion)}")
        for name in ("batch_first", "poisson_sampling", "wrap_model", "rand_on_empty"):
            value = getattr(self, name)
            if not isinstance(value, bool | np.bool_):
                raise PrivflError(f"{name} must be True or False, got {shown(value)}")

    def loop(self) -> tuple[LoopFacts, dict[str, torch.Tensor]]:
        """What is public about the loop; and everything in the model that is not trained, by name.

        Raises:
            PrivflError: If the model, the loader and the optimizer do not fit each other, or the
                model cannot be trained with DP-SGD.
        """
        check_model(self.model)
        check_neighbours(self.model, self.data_loader)
        records, rate, steps = rate_of(self.data_loader)
        parameters = {
            id(p): p
            for group in self.inner_optimizer.param_groups
            for p in group["params"]
            if p.requires_grad
        }
        if parameters.keys() != {id(p) for p in self.model.parameters() if p.requires_grad}:
            raise PrivflError(
                "optimizer must have the trainable parameters of module, all of them and no others"
            )
        untrained = constants(self.model)
        facts = LoopFacts(
            records=records,
            sampling_rate=rate,
            steps=steps,
            parameters=sum(p.numel() for p in parameters.values()),
            constants=digest_of(untrained),
            expected=rate * records,
        )
        return facts, untrained
