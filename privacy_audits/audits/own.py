"""Canaries in somebody's own model: an experiment of theirs, or a loop.

The strongest attacker that differential privacy allows: they know the model after every step, the
canaries, and every record but the canaries that took part. In each step they subtract what the
records add on average, and find by linear regression how much of each canary's clipped gradient is
in what is left. The scores of all steps add up.

How strong that is depends on the model: of canaries with gradients alike, none can be told from the
others. So the same attack is made where noise was forgotten, and if it fails there too, the audit
is inconclusive.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from opacus import GradSampleModule
from torch import nn
from torch.utils.data import Dataset

from privacy_audits.audits import guesses
from privacy_audits.levels import OWN_LEVEL
from privacy_audits.result import AuditResult, Claim
from privacy_audits.targets.inserted import batches
from privfl.dp.checks import wrapping

Vector = NDArray[np.float64]
Loss = Callable[[Any, Any], torch.Tensor]

MOST_CANARIES = 1000
# A model cannot tell more canaries apart than it has parameters; with so many for each, it can.
_PARAMETERS = 5
# Per-example gradients that are in memory at a time, in numbers.
_NUMBERS = 1 << 24


def canaries_for(model: nn.Module) -> int:
    """How many canaries a model can tell apart."""
    return min(MOST_CANARIES, _trained(model) // _PARAMETERS)


def _trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


class Gradients:
    """The clipped gradients of records at any replica of a model, with its own copy of it.

    Args:
        model: left as it is.
        loss: the mean loss of a batch.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self._loss = loss
        plain = copy.deepcopy(model)
        self._parameters = [p for p in plain.parameters() if p.requires_grad]
        self.size = _trained(plain)
        with wrapping("the model"):
            self._model = GradSampleModule(plain, loss_reduction="mean")
        self._model.train()

    @property
    def shapes(self) -> list[torch.Size]:
        """Those of the trained parameters, in their order."""
        return [p.shape for p in self._parameters]

    def load(self, replica: Vector) -> None:
        """Go to a replica; shape (parameters,)."""
        start = 0
        with torch.no_grad():
            for p in self._parameters:
                piece = torch.from_numpy(replica[start : start + p.numel()])
                p.copy_(piece.view_as(p))
                start += p.numel()

    def pieces(self, records: Dataset[Any], max_grad_norm: float) -> Iterator[Vector]:
        """The gradients in order, each cut to ``max_grad_norm``, a piece at a time; shape (records
        of the piece, parameters).
        """
        for inputs, targets in batches(records, max(1, _NUMBERS // self.size)):
            self._model.zero_grad(set_to_none=True)
            self._loss(self._model(inputs), targets).backward()  # type: ignore[no-untyped-call]
            samples: list[torch.Tensor] = [p.grad_sample for p in self._parameters]  # type: ignore[attr-defined]
            rows = torch.cat([g.flatten(1) for g in samples], dim=1).detach().double().numpy()
            lengths = np.linalg.norm(rows, axis=1, keepdims=True)
            clipped = rows * np.minimum(1.0, max_grad_norm / np.maximum(lengths, 1e-300))
            yield np.where(np.isfinite(lengths), np.nan_to_num(clipped), 0.0)


class Attack:
    """Scores of canaries, which add up over steps.

    Args:
        gradients: of the audited model.
        records: all that always take part.
        canaries: all canaries.
        sampling_rate: the probability with which a record takes part in a step.
        max_grad_norm: the clipping norm.

    Attributes:
        scores: so far, higher where a canary seems to have taken part; shape (canaries,).
    """

    def __init__(
        self,
        gradients: Gradients,
        records: Dataset[Any],
        canaries: Dataset[Any],
        sampling_rate: float,
        max_grad_norm: float,
    ) -> None:
        self._gradients, self._records, self._canaries = gradients, records, canaries
        self._rate, self._norm = sampling_rate, max_grad_norm
        self.scores: Vector = np.zeros(len(canaries))  # type: ignore[arg-type]

    def step(self, replica: Vector, moved: Vector) -> None:
        """Use one release.

        Args:
            replica: the model before it; shape (parameters,).
            moved: what was released, a sum of gradients in any unit; same shape.
        """
        self._gradients.load(replica)
        every, average = self._expected()
        self.scores += self._found(every, average, moved)

    def _expected(self) -> tuple[Vector, Vector]:
        """The gradients of all canaries, shape (canaries, parameters), and what records and
        canaries add to a step on average, shape (parameters,).
        """
        every = np.concatenate(list(self._gradients.pieces(self._canaries, self._norm)))
        average = every.sum(axis=0) * self._rate / 2
        for piece in self._gradients.pieces(self._records, self._norm):
            average += piece.sum(axis=0) * self._rate
        return every, average

    def _found(self, every: Vector, average: Vector, moved: Vector) -> Vector:
        """How much of each canary is in what moved, beyond the average; shape (canaries,).

        With G the canaries' gradients, s^2 the variance of what is left in one direction and c that
        of a canary's part, ``(s^2 I + c G G')^-1 G r``: the best linear estimate up to a factor.
        """
        size = float(average @ average)
        # The unit of a release depends on the optimizer; regression finds it.
        unit = float(moved @ average) / size if size > 0.0 else 0.0
        left = moved - unit * average
        spread = float(left @ left) / len(left)
        if spread == 0.0:
            return np.zeros(len(every))
        part = unit**2 * (self._rate / 2 - self._rate**2 / 4)
        matrix = spread * np.eye(len(every)) + part * (every @ every.T)
        return np.asarray(np.linalg.solve(matrix, every @ left), dtype=np.float64)


def results(
    name: str,
    claim: Claim,
    scores: Vector,
    control: Vector,
    took_part: NDArray[np.bool_],
    seconds: float,
) -> Iterator[AuditResult]:
    """Two lower bounds on epsilon from the scores of an :class:`Attack`; see
    :func:`privacy_audits.audits.guesses.results`.
    """
    yield from guesses.results(
        name,
        claim,
        f"guesses which of {len(scores)} inserted canaries took part, knowing all other records "
        "and the model after every step",
        scores,
        control,
        took_part,
        OWN_LEVEL,
        seconds,
    )
