"""Canaries in a training loop of somebody's own, on a :class:`privfl.PrivacyEngine`."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Dataset

from privacy_audits.audits import own
from privacy_audits.audits.own import Gradients, Loss, Vector
from privacy_audits.result import AuditResult, Claim
from privacy_audits.targets.inserted import MadeUp, Records, together
from privfl.accounting import Adversary
from privfl.dp.optimizer import flat
from privfl.errors import PrivflError

if TYPE_CHECKING:
    from opacus.optimizers import DPOptimizer

    from privfl import PrivacyEngine

_WATCHER = Adversary(
    who="whoever sees every step",
    colluders=1,
    honest_shares=1,
    noise_factor=1.0,
    sees="the model after every step",
)


class Canaries:
    """Canaries among records, each of which takes part with probability 1/2.

    Nothing of an audit is charged: the records must be public or made up.

    Args:
        records: a map-style data set of pairs (input, target).
        model: the model as the training starts with it, before an engine wraps it.
        loss: the mean loss of a batch of outputs and targets.

    Attributes:
        training: what to train on: the records, and the canaries that take part.

    Raises:
        PrivflError: If the model cannot be trained with DP-SGD.

    Example:
        >>> import torch
        >>> import privacy_audits
        >>> import privfl
        >>> records = torch.utils.data.TensorDataset(torch.randn(200, 20), torch.arange(200) % 10)
        >>> model, loss = torch.nn.Linear(20, 10), torch.nn.functional.cross_entropy
        >>> canaries = privacy_audits.Canaries(records, model, loss)
        >>> with privfl.PrivacyEngine(site="zurich") as engine:
        ...     model, optimizer, loader = engine.make_private(
        ...         module=model,
        ...         optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ...         data_loader=torch.utils.data.DataLoader(canaries.training, batch_size=64),
        ...         noise_multiplier=6.0,
        ...         max_grad_norm=1.0,
        ...     )
        ...     canaries.watch(optimizer)
        ...     for inputs, targets in loader:
        ...         optimizer.zero_grad()
        ...         loss(model(inputs), targets).backward()
        ...         optimizer.step()
        ...     results = privacy_audits.audit(engine, canaries)
        >>> [str(result.verdict) for result in results]
        ['inconclusive', 'inconclusive']
    """

    __module__ = "privacy_audits"

    def __init__(self, records: Any, model: nn.Module, loss: Loss) -> None:
        plain = Records(records)
        count = max(2, own.canaries_for(model))
        self._records, self._canaries = plain, MadeUp(plain, count, secrets.randbits(63))
        self._took_part = np.random.default_rng().random(count) < 0.5
        # Before an engine puts its hooks on the model.
        self._gradients = Gradients(model, loss)
        self.training: Dataset[Any] = together(plain, self._canaries, self._took_part)
        self._attack: _WithControl | None = None
        self._steps, self._seconds = 0, 0.0

    def watch(self, optimizer: DPOptimizer) -> None:
        """Look at every step from now on, which takes as long as a pass over the records.

        Args:
            optimizer: as ``make_private`` returned it.

        Raises:
            PrivflError: If the canaries watch an optimizer already, or it trains other parameters
                than those of the model that the canaries were made for.
        """
        if self._attack is not None:
            raise PrivflError("these canaries watch an optimizer already; make new ones")
        if [p.shape for p in optimizer.params] != self._gradients.shapes:
            raise PrivflError(
                "the optimizer trains other parameters than those of the model that the canaries "
                "were made for, or in another order; give it model.parameters()"
            )
        rate = optimizer.expected_batch_size / len(self.training)  # type: ignore[arg-type]
        self._attack = attack = _WithControl(
            self._gradients,
            self._records,
            self._canaries,
            rate,
            optimizer.max_grad_norm,
            self._took_part,
        )

        def before_step(*_: Any) -> None:
            began = time.perf_counter()
            replica, moved = (
                flat(tensors).double().numpy()
                for tensors in (optimizer.params, [p.grad for p in optimizer.params])
            )
            attack.step(replica, moved)
            self._steps += 1
            self._seconds += time.perf_counter() - began

        optimizer.original_optimizer.register_step_pre_hook(before_step)

    def results(self, engine: PrivacyEngine, delta: float) -> tuple[AuditResult, ...]:
        """See :func:`audit`."""
        if engine.ledger is not None:
            raise PrivflError(
                f"the engine keeps the ledger {engine.ledger}, so its records are real, and an "
                "audit would show parts of them uncharged; audit public or made-up records, with "
                "an engine without a ledger"
            )
        made = len(engine.accountant)
        if self._attack is None or self._steps != made:
            raise PrivflError(
                f"the canaries saw {self._steps} of the engine's {made} steps; call "
                "canaries.watch(optimizer) right after make_private"
            )
        if made == 0:
            raise PrivflError("the engine has made no step; train before you audit")
        claim = Claim(
            statement="Whoever sees every step learns of one record no more than epsilon at delta.",
            adversary=_WATCHER,
            mechanism=tuple(e.times(n) for e, n in engine.accountant.events.items()),
            delta=delta,
        )
        return tuple(
            own.results(
                "canaries/own loop",
                claim,
                self._attack.scores,
                self._attack.control,
                self._took_part,
                self._seconds,
            )
        )


class _WithControl(own.Attack):
    """The attack, and the same one on the same steps if they had no noise, of batches that are
    drawn for it.
    """

    def __init__(
        self,
        gradients: Gradients,
        records: Records,
        canaries: MadeUp,
        sampling_rate: float,
        max_grad_norm: float,
        took_part: NDArray[np.bool_],
    ) -> None:
        super().__init__(gradients, records, canaries, sampling_rate, max_grad_norm)
        self._took_part, self._rng = took_part, np.random.default_rng()
        self.control: Vector = np.zeros(len(took_part))

    def step(self, replica: Vector, moved: Vector) -> None:
        super().step(replica, moved)
        every, average = self._expected()
        without_noise = (self._drawn(len(every)) & self._took_part) @ every
        for piece in self._gradients.pieces(self._records, self._norm):
            without_noise += self._drawn(len(piece)) @ piece
        self.control += self._found(every, average, without_noise)

    def _drawn(self, records: int) -> NDArray[np.bool_]:
        return self._rng.random(records) < self._rate


def audit(
    engine: PrivacyEngine, canaries: Canaries, *, delta: float = 1e-7
) -> tuple[AuditResult, ...]:
    """How much of epsilon can be shown of a training loop.

    An audit with m canaries can refute no epsilon above about ln m, and needs a delta far below
    1 / m: train with much noise or for few steps, so that the engine claims epsilon 1 or less.

    Args:
        engine: the engine after the loop; without a ledger.
        canaries: what the loop trained on, and what watched its optimizer.
        delta: at which the claim is made.

    Returns:
        Two results: a lower bound on epsilon for every mechanism, and one for a Gaussian.

    Raises:
        PrivflError: If the engine keeps a ledger, or the canaries did not see every step.
    """
    return canaries.results(engine, delta)


audit.__module__ = "privacy_audits"
