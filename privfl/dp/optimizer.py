"""Opacus' DP optimizer with noise from the operating system and a guard against records that poison a sum."""

from __future__ import annotations

from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed

from privfl.dp.randomness import Randomness, gaussian

# Norms are taken in float64; what is left is the rounding of the clip factor, of its product with the gradient and of the sum to
# float32, together below 1e-5. The noise is made larger by this margin, so that the noise multiplier that is accounted for is a lower bound
# of the true one.
SENSITIVITY_MARGIN = 2.0**-10


class SystemNoiseOptimizer(DPOptimizer):  # type: ignore[misc]
    """Adds noise drawn from ``randomness`` instead of torch's generators, and counts how often it did.

    Attributes:
        noise_draws: logical steps whose sum got its noise; the agent compares it with the steps it charged.
        examples_seen: per-example gradients clipped since the counter was last set to 0.
        examples_dropped: how many of them were not finite and were replaced by zero.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, randomness: Randomness, **kwargs: Any) -> None:
        super().__init__(optimizer, **kwargs)
        self._randomness = randomness
        self.noise_draws = 0
        self.examples_seen = 0
        self.examples_dropped = 0

    def forget_unfinished_step(self) -> None:
        """Drop what an interrupted logical step left behind.

        Opacus keeps ``summed_grad`` of an unfinished step and adds it to the next one, whose sensitivity is then 2 C while one step
        is charged.
        """
        self._step_skip_queue: list[bool] = []
        self._is_last_step_skipped = False
        for p in self.params:
            p.summed_grad = None
            p.grad_sample = None

    def clip_and_accumulate(self) -> None:
        """Clip each example's gradient to ``max_grad_norm`` and add it to the sum; a gradient that is not finite counts as zero.

        Opacus takes the norms in float32, which understates them by up to 8e-3 for tensors of 10^7 elements: an example could then contribute
        more than the clipping norm. And one infinite input would turn every weight into NaN; replacing one example's gradient by zero
        changes the sum by at most the clipping norm, so the guarantee stands.
        """
        samples = [self._get_flat_grad_sample(p) for p in self.params]
        squares = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64).square() for g in samples])
        norms = squares.sum(dim=0).sqrt()
        broken = ~torch.isfinite(norms)
        factors = (self.max_grad_norm / norms.clamp(min=1e-12)).clamp(max=1.0)
        self.examples_seen += len(norms)
        self.examples_dropped += int(broken.sum())
        for p, g in zip(self.params, samples, strict=True):
            _check_processed_flag(p.grad_sample)
            if broken.any():
                g[broken] = 0.0
            total = torch.einsum("i,i...", torch.where(broken, 0.0, factors).to(g.dtype), g)
            p.summed_grad = total if p.summed_grad is None else p.summed_grad + total
            _mark_as_processed(p.grad_sample)

    def add_noise(self) -> None:
        """``p.grad`` = sum of clipped gradients + noise of standard deviation sigma * C, over all parameters."""
        standard_deviation = self.noise_multiplier * self.max_grad_norm * (1.0 + SENSITIVITY_MARGIN)
        count = sum(p.numel() for p in self.params)
        noise = torch.from_numpy(gaussian(count, standard_deviation, self._randomness))
        start = 0
        for p in self.params:
            share = noise[start : start + p.numel()].to(device=p.device, dtype=p.dtype).view_as(p)
            p.grad = p.summed_grad.view_as(p) + share
            start += p.numel()
        self.noise_draws += 1
