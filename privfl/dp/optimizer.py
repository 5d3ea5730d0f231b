"""Opacus' DP optimizer, put together from two parts: a *clipper*, which sums the clipped gradients
of a batch, and a *release*, which makes of that sum the noisy one that the optimizer follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizer

from privfl.dp.clipping import Clipper
from privfl.errors import InternalError, PrivflError
from privfl.noise.randomness import Randomness, gaussian

# From this site's sum of clipped gradients to the noisy sum over all sites; both of shape
# (parameters,).
SumGradients = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """All elements of ``tensors`` as one new vector on the CPU."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).cpu()


def split(vector: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The inverse of :func:`flat`: views of ``vector`` in the shapes of the tensors ``like``."""
    parts = torch.split(vector, [tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


class Release(Protocol):
    """Makes of a site's sum of clipped gradients what everybody may see."""

    def noisy(self, totals: Sequence[torch.Tensor], deviation: float) -> list[torch.Tensor]:
        """The noisy sum of one logical step.

        Guarantee: The step is charged before anything is made of ``totals``; if the charge fails,
            nothing is.

        Args:
            totals: the sum, one tensor for each trained parameter.
            deviation: standard deviation of the noise that the step is charged for.

        Returns:
            Tensors of the shapes of ``totals``.
        """
        ...

    def abort(self, error: BaseException) -> None:
        """Let nobody wait for the sum of this site, which cannot make it because of ``error``."""
        ...


class OwnNoise:
    """Noise of this site's own, drawn from ``randomness`` and never from torch's generators.

    Args:
        randomness: the source of the noise.
        charge: debits one step, and raises if the budget does not admit it.

    Attributes:
        draws: logical steps whose sum got its noise. The agent compares it with the steps that it
            charged, so a step without noise does not leave the site.
    """

    def __init__(self, randomness: Randomness, charge: Callable[[], None]) -> None:
        self._randomness, self._charge = randomness, charge
        self.draws = 0

    def noisy(self, totals: Sequence[torch.Tensor], deviation: float) -> list[torch.Tensor]:
        """See :meth:`Release.noisy`; each element gets Gaussian noise of its own."""
        self._charge()
        count = sum(total.numel() for total in totals)
        noise = torch.from_numpy(gaussian(count, deviation, self._randomness))
        noisy = [
            total + part.to(device=total.device, dtype=total.dtype)
            for total, part in zip(totals, split(noise, totals), strict=True)
        ]
        self.draws += 1
        return noisy

    def abort(self, error: BaseException) -> None:
        """Nobody waits for this site."""


class SumOverSites:
    """The sum over all sites, in which the noise already is: here none is added.

    Args:
        sum_gradients: collective; it returns the same sum at every site.
        charge: debits one step, and raises if the budget does not admit it.
        abort_peers: tells the other sites, which wait in ``sum_gradients``, that this one fails.
    """

    def __init__(
        self,
        sum_gradients: SumGradients,
        charge: Callable[[], None],
        abort_peers: Callable[[BaseException], None],
    ) -> None:
        self._sum_gradients, self._charge, self._abort_peers = sum_gradients, charge, abort_peers

    def noisy(self, totals: Sequence[torch.Tensor], deviation: float) -> list[torch.Tensor]:
        """See :meth:`Release.noisy`; ``deviation`` is what all sites agreed on for the sum."""
        try:
            self._charge()
        except Exception as error:
            self.abort(error)
            raise
        total = self._sum_gradients(flat(totals).double().numpy())
        return split(torch.from_numpy(total), totals)

    def abort(self, error: BaseException) -> None:
        """Tell the other sites."""
        self._abort_peers(error)


class SumOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' DPOptimizer, whose logical steps are sums of a clipper that a release makes noisy.

    An interrupted logical step leaves nothing behind, and what is in a sum is counted.

    Guarantee: One record changes the sum of a logical step by at most C (1 + CLIP_MARGIN), with C
        the clipping norm, and nothing but the noisy sum reaches a parameter. This holds as long as
        the sum is of one Poisson batch, whole and used once, of which ``examples_in_step`` tells.

    Args:
        optimizer: the optimizer that makes the steps.
        clipper: sums the clipped gradients of one backward pass.
        release: makes a complete sum noisy; None if another process does it, which then calls
            :meth:`collect` and :meth:`follow`.
        opacus: the keyword arguments of Opacus' DPOptimizer.

    Attributes:
        examples_in_step: per-example gradients in the sum of the logical step so far.
        examples_seen: per-example gradients clipped since the counter was last set to 0.
        examples_dropped: how many of them were not finite and were replaced by zero.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        clipper: Clipper,
        release: Release | None,
        **opacus: Any,
    ) -> None:
        super().__init__(optimizer, **opacus)
        self._clipper, self._release = clipper, release
        self._clipped_to: float | None = None
        self.examples_in_step = self.examples_seen = self.examples_dropped = 0

    # -- the sum of a logical step -----------------------------------------------------------------

    def clip_and_accumulate(self) -> None:
        """Add the clipped gradients of the last backward pass to the sum of the logical step; if it
        fails, the sum is as before.

        Raises:
            PrivflError: If a parameter took no part in the backward pass, or ``max_grad_norm`` was
                changed since the first piece of the step.
        """
        if self._clipped_to not in (None, self.max_grad_norm):
            raise PrivflError(
                "max_grad_norm was changed between the pieces of one step; change it between steps"
            )
        clipped = self._clipper.clip(self.params, self.max_grad_norm)
        for p, total in zip(self.params, clipped.totals, strict=True):
            p.summed_grad = total if p.summed_grad is None else p.summed_grad + total
        self._clipped_to = self.max_grad_norm
        self.examples_in_step += clipped.examples
        self.examples_seen += clipped.examples
        self.examples_dropped += clipped.dropped

    def has_unused_gradients(self) -> bool:
        """Whether there are gradients of a backward pass that are in no sum yet."""
        return self._clipper.has_unused_gradients(self.params)

    @property
    def accumulated_iterations(self) -> int:
        """One: a logical step is one batch, however many backward passes were made for it, and
        ``expected_batch_size`` is that of the whole batch.
        """
        return 1

    def zero_grad(self, set_to_none: bool = False) -> None:
        """As Opacus' ``zero_grad``: the sum of a logical step of which more is to come stays."""
        self._clipper.forget(self._all_parameters())
        super().zero_grad(set_to_none)

    def forget_unfinished_step(self) -> None:
        """Drop what an interrupted logical step left behind.

        Opacus keeps ``summed_grad`` of an unfinished step and adds it to the next one, whose
        sensitivity is then 2 C while one step is charged.
        """
        self._end_step()
        self._step_skip_queue: list[bool] = []
        self._is_last_step_skipped = False
        self._clipper.forget(self._all_parameters())

    def _end_step(self) -> None:
        """What follows belongs to another logical step."""
        self.examples_in_step, self._clipped_to = 0, None
        for p in self._all_parameters():
            p.summed_grad = None

    def _all_parameters(self) -> list[Any]:
        """Also those that were frozen since, which ``params`` leaves out: what they hold of an
        earlier step would come back with them.
        """
        return [p for group in self.param_groups for p in group["params"]]

    def __deepcopy__(self, memo: Any) -> Any:
        raise PrivflError(
            "an optimizer cannot be copied: both copies would step on one charge; keep its "
            "state_dict() instead"
        )

    # -- one step, released here -------------------------------------------------------------------

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """As Opacus' ``pre_step``: make ``p.grad`` of a logical step; False if more of its batch is
        to come.
        """
        if self._release is None:
            raise InternalError("a sum that another process releases was to become a step here")
        try:
            complete = self._take_backward_pass()
        except Exception as error:
            self._release.abort(error)
            raise
        if complete:
            self.add_noise()
            self.scale_grad()
            if self.step_hook is not None:
                self.step_hook(self)
        return complete

    def add_noise(self) -> None:
        """``p.grad`` = the noisy sum of the logical step, which ends; also if the release fails."""
        assert self._release is not None
        deviation = self.noise_multiplier * self.max_grad_norm * self._clipper.sensitivity
        try:
            totals = self._release.noisy([p.summed_grad for p in self.params], deviation)
        except BaseException:
            self.forget_unfinished_step()
            raise
        self._point_along(totals)

    def _take_backward_pass(self) -> bool:
        """Add the last backward pass to the sum; whether the logical step is complete now."""
        self.clip_and_accumulate()
        self._is_last_step_skipped = self._check_skip_next_step()
        return not self._is_last_step_skipped

    def _point_along(self, totals: Sequence[torch.Tensor]) -> None:
        """Make ``p.grad`` of ``totals``, and end the logical step."""
        self._end_step()
        for p, total in zip(self.params, totals, strict=True):
            p.grad = total.to(device=p.device, dtype=p.dtype).view_as(p)

    # -- one step, released by another process -----------------------------------------------------

    def collect(self) -> NDArray[np.float64] | None:
        """Add the last backward pass to the sum, and hand it over once it is complete.

        Returns:
            The sum of clipped gradients of the logical step, without noise, shape (parameters,);
            None if more of its batch is to come.
        """
        if self._release is not None:
            raise InternalError("a sum that is released here was to be handed to another process")
        if not self._take_backward_pass():
            return None
        total: NDArray[np.float64] = flat(p.summed_grad for p in self.params).double().numpy()
        self._end_step()
        return total

    def follow(self, gradient: NDArray[np.float64]) -> None:
        """One step of the wrapped optimizer along ``gradient`` of shape (parameters,), the mean
        that was made of the sums of :meth:`collect`.
        """
        self._point_along(split(torch.from_numpy(gradient), self.params))
        if self.step_hook is not None:
            self.step_hook(self)
        self.original_optimizer.step()
