"""Opacus' DP optimizers with noise from the operating system, or as sums over all sites, and a
guard against records that poison a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed

from privfl.dp.clipping import clip_factors, weighted_sum
from privfl.dp.ghost import GhostModule, clipped_sums
from privfl.errors import InternalError, PrivflError
from privfl.noise.distributed import CLIP_MARGIN
from privfl.noise.randomness import Randomness, gaussian

# From a site's sum of clipped gradients to what the optimizer is to follow: the noisy sum over all
# sites over the public number of records.
Exchange = Callable[[NDArray[np.float64]], NDArray[np.float64]]


class _Whole:
    """What all optimizers here do: an interrupted logical step leaves nothing behind, and what
    is in a sum is counted.

    Attributes:
        examples_in_step: per-example gradients in the sum of the logical step so far.
        examples_seen: per-example gradients clipped since the counter was last set to 0.
        examples_dropped: how many of them were not finite and were replaced by zero.
    """

    params: list[torch.nn.Parameter]
    max_grad_norm: float
    examples_in_step = examples_seen = examples_dropped = 0
    _clipped_to: float | None = None

    def _count(self, examples: int, dropped: int) -> None:
        if self._clipped_to not in (None, self.max_grad_norm):
            raise PrivflError(
                "max_grad_norm was changed between the pieces of one step; change it between steps"
            )
        self._clipped_to = self.max_grad_norm
        self.examples_in_step += examples
        self.examples_seen += examples
        self.examples_dropped += dropped

    @staticmethod
    def _add(p: torch.nn.Parameter, total: torch.Tensor) -> None:
        """To the sum of the logical step."""
        before = p.summed_grad  # type: ignore[attr-defined]
        p.summed_grad = total if before is None else before + total  # type: ignore[attr-defined]

    def step_is_complete(self) -> None:
        """What follows belongs to another logical step."""
        self.examples_in_step, self._clipped_to = 0, None

    def has_unused_gradients(self) -> bool:
        """Whether there are gradients of a backward pass that are in no sum yet."""
        samples = [getattr(p, "grad_sample", None) for p in self.params]
        return any(s is not None and not hasattr(s, "_processed") for s in samples)

    def __deepcopy__(self, memo: Any) -> Any:
        raise PrivflError(
            "an optimizer cannot be copied: both copies would step on one charge; keep its "
            "state_dict() instead"
        )

    def forget_unfinished_step(self) -> None:
        """Drop what an interrupted logical step left behind.

        Opacus keeps ``summed_grad`` of an unfinished step and adds it to the next one, whose
        sensitivity is then 2 C while one step is charged.
        """
        self.step_is_complete()
        self._step_skip_queue: list[bool] = []
        self._is_last_step_skipped = False
        for p in self.params:
            p.summed_grad = None  # type: ignore[attr-defined]
            p.grad_sample = None  # type: ignore[attr-defined]


class _Clipping(_Whole):
    """Clips example by example, from ``grad_sample``."""

    _get_flat_grad_sample: Callable[[torch.nn.Parameter], torch.Tensor]
    # Sums stay in the precision of the parameters, or are taken in float64.
    _exact_sums = False

    def clip_and_accumulate(self) -> None:
        """Clip each example's gradient to ``max_grad_norm`` and add it to the sum; a gradient
        that is not finite counts as zero.

        Opacus takes the norms in float32, which understates them by up to 8e-3 for tensors of 10^7
        elements: an example could then contribute more than the clipping norm. And one infinite
        input would turn every weight into NaN; replacing one example's gradient by zero changes the
        sum by at most the clipping norm, so the guarantee stands.
        """
        samples = [self._get_flat_grad_sample(p) for p in self.params]
        # Of an empty batch Opacus' embeddings make one row of zeros.
        rows = min(len(g) for g in samples)
        samples = samples if rows else [g[:0] for g in samples]
        squares = torch.stack(
            [
                torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64).square()
                for g in samples
            ]
        )
        factors, broken = clip_factors(squares.sum(dim=0).sqrt(), self.max_grad_norm)
        self._count(len(factors), int(broken.sum()))
        for p, g in zip(self.params, samples, strict=True):
            _check_processed_flag(p.grad_sample)  # type: ignore[attr-defined]
            if broken.any():
                g[broken] = 0.0
            self._add(
                p,
                weighted_sum(factors, g)
                if self._exact_sums
                else torch.einsum("i,i...", factors.to(g.dtype), g),
            )
            _mark_as_processed(p.grad_sample)  # type: ignore[attr-defined]


class _GhostClipping(_Whole):
    """Clips example by example, from what a :class:`GhostModule` kept of the backward pass."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, ghost: GhostModule, **kwargs: Any
    ) -> None:
        super().__init__(optimizer, **kwargs)  # type: ignore[call-arg]
        self._ghost = ghost

    @property
    def grad_samples(self) -> list[torch.nn.Parameter]:
        """There are none; Opacus only asks whether anything is trained."""
        return self.params

    accumulated_iterations = 1

    def has_unused_gradients(self) -> bool:
        return self._ghost.holds_any

    def forget_unfinished_step(self) -> None:
        super().forget_unfinished_step()
        self._ghost.forget()

    def step_is_complete(self) -> None:
        super().step_is_complete()
        for p in self.params:
            p.summed_grad = None  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = False) -> None:
        self._ghost.forget()
        super().zero_grad(set_to_none)  # type: ignore[misc]

    def clip_and_accumulate(self) -> None:
        """As that of :class:`_Clipping`, without per-example gradients."""
        sums, examples, dropped = clipped_sums(self._ghost.take(), self.params, self.max_grad_norm)
        self._count(examples, dropped)
        for p, total in zip(self.params, sums, strict=True):
            self._add(p, total)


class _SystemNoise:
    """Adds noise drawn from ``randomness`` instead of torch's generators, and counts how often
    it did.

    Attributes:
        noise_draws: logical steps whose sum got its noise; the agent compares it with the steps it
            charged.
    """

    params: list[torch.nn.Parameter]
    noise_multiplier: float
    max_grad_norm: float

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        randomness: Randomness,
        charge: Callable[[], None] = lambda: None,
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer, **kwargs)  # type: ignore[call-arg]
        self._randomness = randomness
        self._charge = charge
        self.noise_draws = 0

    def add_noise(self) -> None:
        """``p.grad`` = sum of clipped gradients + noise of standard deviation sigma * C, over
        all parameters; charged before.
        """
        try:
            self._charge()
        except BaseException:
            self.forget_unfinished_step()  # type: ignore[attr-defined]
            raise
        standard_deviation = self.noise_multiplier * self.max_grad_norm * (1.0 + CLIP_MARGIN)
        count = sum(p.numel() for p in self.params)
        noise = torch.from_numpy(gaussian(count, standard_deviation, self._randomness))
        start = 0
        for p in self.params:
            share = noise[start : start + p.numel()].to(device=p.device, dtype=p.dtype).view_as(p)
            p.grad = p.summed_grad.view_as(p).to(p.dtype) + share  # type: ignore[attr-defined]
            start += p.numel()
        self.noise_draws += 1
        self.step_is_complete()  # type: ignore[attr-defined]


class _SecureSum:
    """Every logical step follows a sum over all sites, in which the noise already is; here none
    is added.

    ``step`` is :meth:`collect`, the exchange, and :meth:`follow`; who makes the sum in another
    process calls these two.
    """

    params: list[torch.nn.Parameter]
    original_optimizer: torch.optim.Optimizer
    step_hook: Callable[[Any], None] | None
    _check_skip_next_step: Callable[[], bool]
    clip_and_accumulate: Callable[[], None]
    step_is_complete: Callable[[], None]
    forget_unfinished_step: Callable[[], None]

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        exchange: Exchange | None = None,
        abort_peers: Callable[[BaseException], None] = lambda _: None,
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer, **kwargs)  # type: ignore[call-arg]
        self._exchange, self._abort_peers = exchange, abort_peers

    def collect(self) -> NDArray[np.float64] | None:
        """The sum of clipped gradients of the logical step, shape (parameters,); None if more of
        its batch is to come.
        """
        self.clip_and_accumulate()
        self._is_last_step_skipped = self._check_skip_next_step()
        if self._is_last_step_skipped:
            return None
        sums = [p.summed_grad for p in self.params]  # type: ignore[attr-defined]
        return torch.cat([total.detach().reshape(-1).double().cpu() for total in sums]).numpy()

    def follow(self, gradient: NDArray[np.float64]) -> None:
        """One step of the wrapped optimizer along ``gradient`` of shape (parameters,)."""
        self.step_is_complete()
        vector, start = torch.from_numpy(gradient), 0
        for p in self.params:
            p.grad = vector[start : start + p.numel()].to(device=p.device, dtype=p.dtype).view_as(p)
            start += p.numel()
        if self.step_hook is not None:
            self.step_hook(self)
        self.original_optimizer.step()

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Opacus' ``step``; every site must call it equally often."""
        if closure is not None:
            with torch.enable_grad():
                closure()
        try:
            total = self.collect()
        except Exception as error:
            self._abort_peers(error)
            raise
        if total is not None:
            if self._exchange is None:
                raise InternalError("an optimizer without an exchange was to make a step by itself")
            try:
                gradient = self._exchange(total)
            except BaseException:
                self.forget_unfinished_step()
                raise
            self.follow(gradient)


class SystemNoiseOptimizer(_SystemNoise, _Clipping, DPOptimizer):  # type: ignore[misc]
    """Opacus' DPOptimizer with noise of this site's own."""


class SystemNoiseGhostOptimizer(_SystemNoise, _GhostClipping, DPOptimizer):  # type: ignore[misc]
    """The same for ghost clipping."""


class SecureSumOptimizer(_SecureSum, _Clipping, DPOptimizer):  # type: ignore[misc]
    """Opacus' DPOptimizer whose steps are sums over all sites."""

    _exact_sums = True


class SecureSumGhostOptimizer(_SecureSum, _GhostClipping, DPOptimizer):  # type: ignore[misc]
    """The same for ghost clipping."""
