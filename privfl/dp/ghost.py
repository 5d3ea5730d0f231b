"""Ghost clipping in one backward pass: norms of per-example gradients, and the sum of the clipped
gradients, without the gradients themselves.

Opacus' own ghost clipping takes norms in a first backward pass and lets a second one, of a rescaled
loss, make the sum. Then everything that the first pass does not see is not clipped: another
criterion, a weight that is also used by a function, a layer that was frozen. Here activations a and
output gradients b of every layer are kept until the step; the norms and, with the clip factors, the
sum come from these alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from opacus import GradSampleModule
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient
from torch import nn

from privfl.dp.clipping import ClippedSum, check_complete, clip_factors, weighted_sum
from privfl.errors import PrivflError
from privfl.noise.distributed import CLIP_MARGIN

# The squared norm of a sum over a sequence, from products of its terms, is off by rounding: at most
# 2^-30 of (sum of the terms' norms)^2 for sequences of 2800 elements. It is added, so that a norm
# is never understated, also where the terms nearly cancel.
_CANCELLATION = 2.0**-30


@dataclass
class Piece:
    """What one use of a layer leaves of a batch.

    Attributes:
        layer: the layer that was used.
        activations: its inputs, each of shape (rows, ...).
        backprops: the gradient of the loss by its output, shape (rows, ...), each row of its own
            record's loss.
    """

    layer: nn.Module
    activations: list[torch.Tensor]
    backprops: torch.Tensor

    @property
    def is_plain(self) -> bool:
        """Whether norms and sums are made without per-example gradients."""
        return _is_plain(self.layer)

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters of the layer."""
        return [p for p in self.layer.parameters(recurse=not self.is_plain) if p.requires_grad]

    def samples(self) -> dict[torch.Tensor, torch.Tensor]:
        """Per-example gradients by parameter, shape (rows, ...), as Opacus makes them."""
        if not len(self.backprops):
            return {p: p.detach().new_zeros((0, *p.shape)) for p in self.parameters()}
        sampler = GradSampleModule.GRAD_SAMPLERS.get(
            type(self.layer), ft_compute_per_sample_gradient
        )
        samples: dict[torch.Tensor, torch.Tensor] = sampler(
            self.layer, self.activations, self.backprops
        )
        return {p: g[: len(self.backprops)] for p, g in samples.items() if p.requires_grad}

    def squared_norms(self) -> dict[torch.Tensor, torch.Tensor]:
        """Upper bounds on the squared norms of per-example gradients, by parameter; shape (rows,),
        in float64.
        """
        if not self.is_plain:
            return {p: g.flatten(1).double().square().sum(dim=1) for p, g in self.samples().items()}
        if isinstance(self.layer, nn.Embedding):
            return {self.layer.weight: self._embedding_norms(self.layer)}
        a, b = (
            t.flatten(1, -2) if t.dim() > 2 else t.unsqueeze(1)
            for t in (self.activations[0].double(), self.backprops.double())
        )
        norms = {}
        layer: Any = self.layer
        if layer.weight.requires_grad:
            norms[layer.weight] = _squares((b @ b.mT) * (a @ a.mT), b.norm(dim=2) * a.norm(dim=2))
        if layer.bias is not None and layer.bias.requires_grad:
            norms[layer.bias] = b.sum(dim=1).square().sum(dim=1)
        return norms

    def _embedding_norms(self, layer: nn.Embedding) -> torch.Tensor:
        """Words that occur twice in a record have their gradients added."""
        words, b = self._words(layer)
        same = words.unsqueeze(2) == words.unsqueeze(1)
        return _squares((b @ b.mT) * same, b.norm(dim=2))

    def _words(self, layer: nn.Embedding) -> tuple[torch.Tensor, torch.Tensor]:
        """The words of each row, shape (rows, words), and what is added to the gradient of each,
        shape (rows, words, dimensions).
        """
        rows = len(self.backprops)
        words = self.activations[0].reshape(rows, -1 if rows else 1)
        return words, self.backprops.double().reshape(rows, words.shape[1], layer.embedding_dim)

    def weighted(self, factors: torch.Tensor) -> dict[torch.Tensor, torch.Tensor]:
        """sum_i factors_i * gradient_i by parameter, in float64 and of the parameter's shape; a
        record with factor 0 is left out, whatever it holds.

        ``factors`` of shape (examples,), of which the layer saw the first rows.
        """
        rows = len(self.backprops)
        factors = factors[:rows]
        if not self.is_plain:
            return {p: weighted_sum(factors, g) for p, g in self.samples().items()}
        used = factors != 0
        factors = factors[used]
        if isinstance(self.layer, nn.Embedding):
            words, b = self._words(self.layer)
            total = torch.zeros(self.layer.weight.shape, dtype=torch.float64, device=b.device)
            b = b[used] * factors[:, None, None]
            return {
                self.layer.weight: total.index_add_(0, words[used].reshape(-1), b.flatten(0, 1))
            }
        layer: Any = self.layer
        a, b = self.activations[0][used].double(), self.backprops[used].double()
        b = (b * factors.view(-1, *[1] * (b.dim() - 1))).reshape(-1, b.shape[-1])
        sums = {}
        if layer.weight.requires_grad:
            sums[layer.weight] = b.T @ a.reshape(-1, a.shape[-1])
        if layer.bias is not None and layer.bias.requires_grad:
            sums[layer.bias] = b.sum(dim=0)
        return sums


def _squares(products: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The squared norm of a sum of terms, from their inner products, shape (rows, terms, terms),
    and norms, shape (rows, terms).
    """
    return products.sum(dim=(1, 2)).clamp(min=0.0) + _CANCELLATION * lengths.sum(dim=1).square()


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) in (nn.Linear, nn.Embedding)


class GhostModule(GradSampleModule):  # type: ignore[misc]
    """Opacus' module, which keeps activations and output gradients in place of per-example
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
        """Whether a backward pass left something since the last :meth:`take`."""
        return bool(self._pieces)

    def forget(self) -> None:
        """Drop what backward passes left."""
        self._pieces.clear()

    def take(self) -> list[Piece]:
        """What backward passes left since the last call."""
        taken, self._pieces = self._pieces, []
        return taken


class GhostClipper:
    """The :class:`privfl.dp.clipping.Clipper` of a :class:`GhostModule`: the same sums, without
    per-example gradients.
    """

    sensitivity = 1.0 + CLIP_MARGIN

    def __init__(self, module: GhostModule) -> None:
        self._module = module

    def clip(self, parameters: Sequence[nn.Parameter], max_grad_norm: float) -> ClippedSum:
        """See :meth:`privfl.dp.clipping.Clipper.clip`."""
        return clipped_sum(self._module.take(), parameters, max_grad_norm)

    def has_unused_gradients(self, parameters: Sequence[nn.Parameter]) -> bool:
        """See :meth:`privfl.dp.clipping.Clipper.has_unused_gradients`."""
        return self._module.holds_any

    def forget(self, parameters: Sequence[nn.Parameter]) -> None:
        """See :meth:`privfl.dp.clipping.Clipper.forget`."""
        self._module.forget()


def clipped_sum(
    pieces: Sequence[Piece], parameters: Sequence[nn.Parameter], max_grad_norm: float
) -> ClippedSum:
    """For each of ``parameters`` the sum of its per-example gradients, in float64.

    Guarantee: Each example adds at most ``max_grad_norm``, over all ``parameters`` together and
        but for rounding; one whose gradient is not finite adds nothing.

    Raises:
        PrivflError: If a parameter took no part in the backward pass.
    """
    uses = Counter(id(p) for piece in pieces for p in piece.parameters())
    check_complete(sum(not uses[id(p)] for p in parameters))
    examples = max(len(piece.backprops) for piece in pieces)
    once: list[Piece] = []
    several: list[Piece] = []
    for piece in pieces:
        (once if all(uses[id(p)] == 1 for p in piece.parameters()) else several).append(piece)
    added = _added_up(several, examples)
    squares = torch.zeros(examples, dtype=torch.float64, device=parameters[0].device)
    for piece in once:
        for square in piece.squared_norms().values():
            squares[: len(piece.backprops)] += square
    for g in added.values():
        squares += g.flatten(1).square().sum(dim=1)
    factors, broken = clip_factors(squares.sqrt(), max_grad_norm)
    totals = {key: weighted_sum(factors, g) for key, g in added.items()}
    for piece in once:
        totals |= {id(p): total for p, total in piece.weighted(factors).items()}
    if not {id(p) for p in parameters} <= totals.keys():
        raise PrivflError(
            "a parameter that is trained has no per-example gradients; use grad_sample_mode hooks"
        )
    return ClippedSum([totals[id(p)] for p in parameters], examples, int(broken.sum()))


def _added_up(pieces: Sequence[Piece], examples: int) -> Mapping[int, torch.Tensor]:
    """Per-example gradients of parameters that were used more than once, in float64, by the
    parameter's id; shape (examples, ...). The gradients of all uses add up before they are squared.
    """
    added: dict[int, torch.Tensor] = {}
    for piece in pieces:
        for p, g in piece.samples().items():
            if id(p) not in added:
                added[id(p)] = torch.zeros(
                    (examples, *p.shape), dtype=torch.float64, device=g.device
                )
            added[id(p)][: len(piece.backprops)] += g
    return added
