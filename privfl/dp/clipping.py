"""How much of each example's gradient counts, and sums of what counts: the same with per-example
gradients and without.
"""

from __future__ import annotations

import torch

# Elements of per-example gradients that are made float64 at a time.
_PIECE = 1 << 22


def clip_factors(norms: torch.Tensor, max_grad_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The factor of each example's gradient, 0 where its norm is not finite; and where that is.

    All of shape (examples,).
    """
    broken = ~torch.isfinite(norms)
    return torch.where(broken, 0.0, (max_grad_norm / norms.clamp(min=1e-12)).clamp(max=1.0)), broken


def weighted_sum(factors: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """sum_i factors_i * samples_i in float64, a few examples at a time; an example with factor 0
    is left out, whatever it holds.
    """
    rows = samples.flatten(1)
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    few = max(1, _PIECE // max(1, rows.shape[1]))
    for start in range(0, len(rows), few):
        some = factors[start : start + few]
        kept = some != 0
        total += some[kept] @ rows[start : start + few][kept].double()
    return total.view(samples.shape[1:])
