"""What one record adds to a sum of gradients: per-example gradients, each cut to the clipping norm,
and their sum.

A :class:`Clipper` makes that sum of one backward pass: :class:`ExampleClipper` from the per-example
gradients that Opacus' hooks leave behind, :class:`privfl.dp.ghost.GhostClipper` without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch import nn

from privfl.errors import PrivflError
from privfl.noise.distributed import CLIP_MARGIN

# Elements of per-example gradients that are made float64 at a time.
_PIECE = 1 << 22


@dataclass(frozen=True)
class ClippedSum:
    """What one backward pass adds to the sum of a logical step.

    Attributes:
        totals: for each trained parameter the sum of its clipped per-example gradients, of the
            parameter's shape.
        examples: how many per-example gradients there were.
        dropped: how many of them were not finite, and counted as zero.
    """

    totals: list[torch.Tensor]
    examples: int
    dropped: int


class Clipper(Protocol):
    """Makes the sum of clipped gradients of one backward pass after another.

    Guarantee: One record, with one row in its batch, changes the sum by at most ``sensitivity``
        times the clipping norm in Euclidean length, over all parameters together and whatever the
        record holds: a gradient that is not finite counts as zero.
    """

    @property
    def sensitivity(self) -> float:
        """What one record changes in a sum at most, in units of the clipping norm."""
        ...

    def clip(self, parameters: Sequence[nn.Parameter], max_grad_norm: float) -> ClippedSum:
        """The clipped sum of what was not used yet; it is used up by this call.

        Raises:
            PrivflError: If a parameter took no part in the backward pass.
        """
        ...

    def has_unused_gradients(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether there are gradients of a backward pass that are in no sum yet."""
        ...

    def forget(self, parameters: Sequence[nn.Parameter]) -> None:
        """Drop what backward passes left behind, used or not."""
        ...


def samples_of(p: Any) -> torch.Tensor | list[torch.Tensor] | None:
    """The per-example gradients that Opacus keeps at a parameter, shape (examples, ...): a list of
    them if there were several backward passes.
    """
    samples: torch.Tensor | list[torch.Tensor] | None = getattr(p, "grad_sample", None)
    return samples


def set_samples(p: Any, samples: torch.Tensor | None) -> None:
    """Put per-example gradients, shape (examples, ...), where Opacus keeps those of ``p``."""
    p.grad_sample = samples


class ExampleClipper:
    """The :class:`Clipper` of per-example gradients, as Opacus' hooks leave them.

    Opacus takes the norms in float32, which understates them by up to 8e-3 for tensors of 10^7
    elements: an example could then contribute more than the clipping norm. And one infinite input
    would turn every weight into NaN. Here norms are taken in float64, and a gradient that is not
    finite is replaced by zero, which changes the sum by at most the clipping norm.

    Args:
        exact: take the sums in float64 too, as sums over sites need them; otherwise they stay in
            the precision of the gradients.
    """

    sensitivity = 1.0 + CLIP_MARGIN

    def __init__(self, *, exact: bool) -> None:
        self._exact = exact

    def clip(self, parameters: Sequence[nn.Parameter], max_grad_norm: float) -> ClippedSum:
        """See :meth:`Clipper.clip`.

        Raises:
            PrivflError: If a parameter took no part in the backward pass.
            ValueError: If gradients were used already, because zero_grad() was left out.
        """
        recorded = [samples_of(p) for p in parameters]
        check_complete(sum(samples is None for samples in recorded))
        for samples in recorded:
            _check_processed_flag(samples)
        rows = [torch.cat(s) if isinstance(s, list) else s for s in recorded if s is not None]
        squares = torch.stack(
            [
                torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64).square()
                for g in rows
            ]
        )
        factors, broken = clip_factors(squares.sum(dim=0).sqrt(), max_grad_norm)
        totals = [self._sum(factors, broken, g) for g in rows]
        for samples in recorded:
            _mark_as_processed(samples)
        return ClippedSum(totals, len(factors), int(broken.sum()))

    def _sum(self, factors: torch.Tensor, broken: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        if self._exact:
            return weighted_sum(factors, g)
        if broken.any():
            g[broken] = 0.0
        return torch.einsum("i,i...", factors.to(g.dtype), g)

    def has_unused_gradients(self, parameters: Sequence[nn.Parameter]) -> bool:
        """See :meth:`Clipper.has_unused_gradients`."""
        passes = [s if isinstance(s, list) else [s] for s in map(samples_of, parameters)]
        return any(g is not None and not hasattr(g, "_processed") for s in passes for g in s)

    def forget(self, parameters: Sequence[nn.Parameter]) -> None:
        """See :meth:`Clipper.forget`."""
        for p in parameters:
            set_samples(p, None)


def check_complete(missing: int) -> None:
    """Refuse a step to which ``missing`` parameters contribute nothing.

    Raises:
        PrivflError: If ``missing`` is not 0.
    """
    if missing:
        raise PrivflError(
            f"optimizer.step() without gradients of {missing} trained parameters: call backward() "
            "once before every step, and freeze layers that take no part in the forward pass "
            "before make_private"
        )


def clip_factors(norms: torch.Tensor, max_grad_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What each example's gradient is multiplied by, min(1, max_grad_norm / norm), and 0 where the
    norm is not finite; and where that is.

    All of shape (examples,); ``norms`` in float64.
    """
    broken = ~torch.isfinite(norms)
    return torch.where(broken, 0.0, (max_grad_norm / norms.clamp(min=1e-12)).clamp(max=1.0)), broken


def weighted_sum(factors: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """sum_i factors_i * samples_i in float64, a few examples at a time.

    An example with factor 0 is left out, whatever it holds. ``factors`` of shape (examples,),
    ``samples`` of shape (examples, ...), the sum of shape (...).
    """
    rows = samples.flatten(1)
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    at_a_time = max(1, _PIECE // max(1, rows.shape[1]))
    for start in range(0, len(rows), at_a_time):
        weights = factors[start : start + at_a_time]
        used = weights != 0
        total += weights[used] @ rows[start : start + at_a_time][used].double()
    return total.view(samples.shape[1:])
