"""Ghost clipping in one backward pass: norms of per-example gradients without the gradients, and
a sum made of what the norms were taken of.

Opacus' own ghost clipping takes norms in a first backward pass and lets a second one, of a rescaled
loss, make the sum. Then everything that the first pass does not see is not clipped: another
criterion, a weight that is also used by a function, a layer that was frozen. Here activations a and
output gradients b of every layer are kept until the step; the norms and, with the clip factors, the
sum come from these alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from opacus import GradSampleModule
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient
from torch import nn

from privfl.dp.clipping import clip_factors, weighted_sum
from privfl.errors import PrivflError

# The squared norm of a sum over a sequence, from products of its terms, is off by rounding: at most
# 2^-30 of (sum of the terms' norms)^2 for sequences of 2800 elements. It is added, so that a norm
# is never understated, also where the terms nearly cancel.
_CANCELLATION = 2.0**-30


@dataclass
class Piece:
    """What one use of a layer leaves of a batch: ``activations`` it was given and ``backprops``,
    of the loss by its output, rows first.
    """

    layer: nn.Module
    activations: list[torch.Tensor]
    backprops: torch.Tensor

    def parameters(self) -> list[nn.Parameter]:
        """The trained ones of the layer."""
        return [
            p for p in self.layer.parameters(recurse=not _is_plain(self.layer)) if p.requires_grad
        ]

    def samples(self) -> dict[torch.Tensor, torch.Tensor]:
        """Per-example gradients, shape (rows, ...), as Opacus makes them."""
        if not len(self.backprops):
            return {p: p.detach().new_zeros((0, *p.shape)) for p in self.parameters()}
        sampler = GradSampleModule.GRAD_SAMPLERS.get(
            type(self.layer), ft_compute_per_sample_gradient
        )
        found: dict[torch.Tensor, torch.Tensor] = sampler(
            self.layer, self.activations, self.backprops
        )
        return {p: g[: len(self.backprops)] for p, g in found.items() if p.requires_grad}

    def squared_norms(self) -> dict[torch.Tensor, torch.Tensor]:
        """Upper bounds on the squared norms of per-example gradients, shape (rows,), in float64;
        of a linear layer or an embedding.
        """
        if isinstance(self.layer, nn.Embedding):
            return {self.layer.weight: self._embedding_norms(self.layer)}
        a, b = (
            t.flatten(1, -2) if t.dim() > 2 else t.unsqueeze(1)
            for t in (self.activations[0].double(), self.backprops.double())
        )
        found = {}
        layer: Any = self.layer
        if layer.weight.requires_grad:
            found[layer.weight] = _squares((b @ b.mT) * (a @ a.mT), b.norm(dim=2) * a.norm(dim=2))
        if layer.bias is not None and layer.bias.requires_grad:
            found[layer.bias] = b.sum(dim=1).square().sum(dim=1)
        return found

    def _embedding_norms(self, layer: nn.Embedding) -> torch.Tensor:
        """Words that occur twice in a record have their gradients added."""
        words, b = self._words(layer)
        same = words.unsqueeze(2) == words.unsqueeze(1)
        return _squares((b @ b.mT) * same, b.norm(dim=2))

    def _words(self, layer: nn.Embedding) -> tuple[torch.Tensor, torch.Tensor]:
        rows = len(self.backprops)
        words = self.activations[0].reshape(rows, -1 if rows else 1)
        return words, self.backprops.double().reshape(rows, words.shape[1], layer.embedding_dim)

    def weighted(self, factors: torch.Tensor) -> dict[torch.Tensor, torch.Tensor]:
        """sum_i factors_i * gradient_i of a linear layer or an embedding; a record with factor 0
        is left out, whatever it holds.
        """
        rows = len(self.backprops)
        factors = factors[:rows]
        kept = factors != 0
        factors = factors[kept]
        if isinstance(self.layer, nn.Embedding):
            words, b = self._words(self.layer)
            total = torch.zeros(self.layer.weight.shape, dtype=torch.float64, device=b.device)
            b = b[kept] * factors[:, None, None]
            return {
                self.layer.weight: total.index_add_(0, words[kept].reshape(-1), b.flatten(0, 1))
            }
        layer: Any = self.layer
        a, b = self.activations[0][kept].double(), self.backprops[kept].double()
        b = (b * factors.view(-1, *[1] * (b.dim() - 1))).reshape(-1, b.shape[-1])
        found = {}
        if layer.weight.requires_grad:
            found[layer.weight] = b.T @ a.reshape(-1, a.shape[-1])
        if layer.bias is not None and layer.bias.requires_grad:
            found[layer.bias] = b.sum(dim=0)
        return found


def _squares(products: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return products.sum(dim=(1, 2)).clamp(min=0.0) + _CANCELLATION * lengths.sum(dim=1).square()


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) in (nn.Linear, nn.Embedding)


class GhostModule(GradSampleModule):  # type: ignore[misc]
    """Opacus' module, which keeps what per-example gradients are made of in place of the
    gradients.
    """

    def __init__(self, module: nn.Module, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)
        self._pieces: list[Piece] = []

    def capture_backprops_hook(
        self,
        module: Any,
        _forward_input: Any,
        forward_output: Any,
        loss_reduction: str,
        batch_first: bool,
    ) -> None:
        """Keep a layer's part of the batch."""
        if not self.hooks_enabled:
            return
        activations, backprops = self.rearrange_grad_samples(
            module=module,
            backprops=forward_output[0].detach(),
            loss_reduction=loss_reduction,
            batch_first=batch_first,
        )
        self._pieces.append(Piece(module, activations, backprops))
        if not module.activations and hasattr(module, "max_batch_len"):
            del module.max_batch_len

    @property
    def holds_any(self) -> bool:
        """Whether something was kept since the last :meth:`take`."""
        return bool(self._pieces)

    def forget(self) -> None:
        """Drop what was kept."""
        self._pieces.clear()

    def take(self) -> list[Piece]:
        """What was kept since the last call."""
        taken, self._pieces = self._pieces, []
        return taken


def clipped_sums(
    pieces: Sequence[Piece], parameters: Sequence[nn.Parameter], max_grad_norm: float
) -> tuple[list[torch.Tensor], int, int]:
    """For each of ``parameters`` the sum of its per-example gradients, each example clipped to
    ``max_grad_norm`` over all of them together.

    An example whose gradient is not finite counts as zero. In float64; also how many examples there
    were, and how many were not finite.

    Raises:
        PrivflError: a parameter took no part in the backward pass.
    """
    uses = Counter(id(p) for piece in pieces for p in piece.parameters())
    missing = sum(not uses[id(p)] for p in parameters)
    if missing:
        raise PrivflError(
            f"optimizer.step() without gradients of {missing} trained parameters: call backward() "
            f"once before every step, and freeze layers that "
            "take no part in the forward pass before make_private"
        )
    count = max(len(piece.backprops) for piece in pieces)
    device = parameters[0].device
    squares = torch.zeros(count, dtype=torch.float64, device=device)
    whole: dict[
        int, torch.Tensor
    ] = {}  # gradients of parameters that were used more than once add up before they are squared
    once: list[Piece] = []
    for piece in pieces:
        rows = len(piece.backprops)
        if all(uses[id(p)] == 1 for p in piece.parameters()):
            once.append(piece)
            if _is_plain(piece.layer):
                found = piece.squared_norms()
            else:
                found = {
                    p: g.flatten(1).double().square().sum(dim=1) for p, g in piece.samples().items()
                }
            for square in found.values():
                squares[:rows] += square
        else:
            for p, g in piece.samples().items():
                if id(p) not in whole:
                    whole[id(p)] = torch.zeros(
                        (count, *p.shape), dtype=torch.float64, device=device
                    )
                whole[id(p)][:rows] += g
    for g in whole.values():
        squares += g.flatten(1).square().sum(dim=1)
    factors, broken = clip_factors(squares.sqrt(), max_grad_norm)
    sums = {key: weighted_sum(factors, g) for key, g in whole.items()}
    for piece in once:
        if _is_plain(piece.layer):
            sums |= {id(p): total for p, total in piece.weighted(factors).items()}
        else:
            sums |= {id(p): weighted_sum(factors[: len(g)], g) for p, g in piece.samples().items()}
    if not {id(p) for p in parameters} <= sums.keys():
        raise PrivflError(
            "a parameter that is trained has no per-example gradients; use grad_sample_mode hooks"
        )
    return [sums[id(p)] for p in parameters], count, int(broken.sum())
