"""Ghost clipping whose norms are not understated, and which stops where a record would poison the sum."""

from __future__ import annotations

from typing import Any

import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping

from privfl.errors import PrivflError

# Layers without a ghost norm have the norms of their gradients taken in float32, which understates them by up to 8e-3 for 10^7 elements: so all
# is clipped to this much less.
_FLOAT32_NORMS = 2.0**-7


class GhostModule(GradSampleModuleFastGradientClipping):  # type: ignore[misc]
    """Opacus' module for ghost clipping; the norms of layers that have a ghost norm are taken in float64."""

    def __init__(self, module: torch.nn.Module, *, max_grad_norm: float, **kwargs: Any) -> None:
        super().__init__(module, max_grad_norm=max_grad_norm * (1.0 - _FLOAT32_NORMS), **kwargs)

    def rearrange_grad_samples(self, *, module: torch.nn.Module, **kwargs: Any) -> Any:
        """A ghost norm is a sum of products of activations and gradients that may nearly cancel."""
        activations, backprops = super().rearrange_grad_samples(module=module, **kwargs)
        if type(module) not in self.NORM_SAMPLERS:
            return activations, backprops
        return [a.double() if a.is_floating_point() else a for a in activations], backprops.double()

    def get_clipping_coef(self) -> torch.Tensor:
        """The factor of each example's loss; shape (batch,).

        Raises:
            PrivflError: a gradient is not finite. Here it cannot be dropped: zero times infinity is not zero, and the sum would be NaN.
        """
        factors: torch.Tensor = super().get_clipping_coef()
        if not torch.isfinite(self.per_sample_gradient_norms).all():
            raise PrivflError(
                "a record's gradient is NaN or infinite, which grad_sample_mode ghost cannot leave out; clean the data, or use grad_sample_mode hooks"
            )
        return factors
