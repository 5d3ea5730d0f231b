"""The local training of one site: one Opacus engine for the whole run, rounds of DP-SGD on a
flat vector of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from opacus import GradSampleModule
from torch import nn
from torch.utils.data import TensorDataset, default_collate

from privfl.dp.checks import (
    TRIED,
    check_constants,
    check_isolation,
    check_model,
    constants,
    digest_of,
    outputs_coupled,
    wrapping,
)
from privfl.dp.optimizer import SecureSumOptimizer, SystemNoiseOptimizer
from privfl.errors import PrivflError, in_one_line
from privfl.noise.randomness import Randomness, poisson_sample

# Per-example gradients of one physical batch may take this much memory; larger Poisson batches are
# processed in pieces.
_GRADIENT_BYTES = 512 << 20
_EVALUATION_BATCH = 4096
# Fewer broken records than this never stop a round.
_MANY = 20

_Made = TypeVar("_Made")
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


@dataclass(frozen=True)
class Recipe:
    """How a site trains. ``sampling_rate`` is the public q, never derived from batch sizes.

    ``noise_multiplier``: of the noise that every local step gets here; None if steps are sums over
    all sites, which have their noise from elsewhere.
    """

    sampling_rate: float
    noise_multiplier: float | None
    max_grad_norm: float
    local_steps: int
    optimizer: str
    optimizer_options: Mapping[str, float]


class LocalTraining:
    """DP-SGD on one site's records, for the whole run.

    Raises (from the constructor):
        PrivflError: the model or the number of records does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        train: Any,
        recipe: Recipe,
        randomness: Randomness,
        device: torch.device,
    ) -> None:
        check_model(model)
        self.records = _size("train", train)
        expected = recipe.sampling_rate * self.records
        if self.records == 0:
            raise PrivflError("data() returned no training records")
        if expected < 1.0:
            raise PrivflError(
                f"{self.records} training records at sampling_rate {recipe.sampling_rate:g} make "
                f"{expected:.2g} records a step on average; "
                f"raise sampling_rate to at least {1.0 / self.records:.2g}, better ten times that"
            )
        self.model = model.to(device)
        self._loss = loss
        self._train = train
        self._recipe = recipe
        self._randomness = randomness
        self._device = device
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.parameters = sum(p.numel() for p in self._parameters)
        self._piece = max(1, _GRADIENT_BYTES // (4 * self.parameters))
        with wrapping("model()"):
            self._wrapped = GradSampleModule(
                self.model, batch_first=True, loss_reduction="mean", strict=True
            )
        self.optimizer = self._make_optimizer(recipe, randomness, expected)
        # Noise of local steps, or batches of sums: the agent compares it with the steps it charged.
        self.draws = 0
        self._constants = constants(self.model)
        self._try_isolation()

    def _make_optimizer(
        self, recipe: Recipe, randomness: Randomness, expected: float
    ) -> SystemNoiseOptimizer | SecureSumOptimizer:
        inner = _OPTIMIZERS[recipe.optimizer](self._parameters, **recipe.optimizer_options)
        common: dict[str, Any] = {
            "max_grad_norm": recipe.max_grad_norm,
            "expected_batch_size": expected,
        }
        if recipe.noise_multiplier is None:
            return SecureSumOptimizer(inner, noise_multiplier=0.0, **common)
        return SystemNoiseOptimizer(
            inner, randomness=randomness, noise_multiplier=recipe.noise_multiplier, **common
        )

    def flat(self) -> NDArray[np.float32]:
        """The trainable parameters as one vector of shape (parameters,)."""
        return torch.cat([p.detach().reshape(-1) for p in self._parameters]).cpu().numpy()

    def constants_digest(self) -> str:
        """SHA-256 over everything in the model that is not trained; it must be the same at all
        sites.
        """
        return digest_of(self._constants)

    def load(self, replica: NDArray[np.float32]) -> None:
        """Put a vector of shape (parameters,) into the model."""
        vector, start = torch.from_numpy(replica).to(self._device), 0
        with torch.no_grad():
            for p in self._parameters:
                p.copy_(vector[start : start + p.numel()].view_as(p))
                start += p.numel()

    def train_round(self, replica: NDArray[np.float32]) -> NDArray[np.float32]:
        """``local_steps`` steps of DP-SGD from ``replica``; the update (end - start) of shape
        (parameters,).

        The optimizer's state starts anew, so that an update is a function of the replica and this
        round's records only.

        Raises:
            PrivflError: the loss or the parameters are not finite, or the model changed a buffer.
        """
        self._start_round(replica)
        self.optimizer.original_optimizer.state.clear()
        for _ in range(self._recipe.local_steps):
            self._go_through(self._sample(), self.optimizer.step)
        self._check_round()
        assert isinstance(self.optimizer, SystemNoiseOptimizer)
        self.draws = self.optimizer.noise_draws
        update = self.flat() - replica
        if not np.isfinite(update).all():
            raise PrivflError("the parameters became NaN or infinite; lower optimizer.lr")
        return update

    def sum_gradients(self, replica: NDArray[np.float32]) -> NDArray[np.float64]:
        """The sum of clipped gradients of a new Poisson sample at ``replica``, without noise;
        shape (parameters,).

        Raises:
            PrivflError: the loss is not finite for every record, or the model changed a buffer.
        """
        assert isinstance(self.optimizer, SecureSumOptimizer)
        self._start_round(replica)
        total = self._go_through(self._sample(), self.optimizer.collect)
        self._check_round()
        self.draws += 1
        assert total is not None
        return total

    def follow(self, gradient: NDArray[np.float64]) -> NDArray[np.float32]:
        """One optimizer step along ``gradient``, the same at all sites; the new replica.

        Both of shape (parameters,).

        The optimizer's state goes on from step to step: it is a function of earlier sums alone, and
        the same everywhere.

        Raises:
            PrivflError: the parameters are not finite.
        """
        assert isinstance(self.optimizer, SecureSumOptimizer)
        self.optimizer.follow(gradient)
        self.optimizer.zero_grad(set_to_none=True)
        replica = self.flat()
        if not np.isfinite(replica).all():
            raise PrivflError("the parameters became NaN or infinite; lower optimizer.lr")
        return replica

    def _start_round(self, replica: NDArray[np.float32]) -> None:
        self.load(replica)
        self.optimizer.examples_seen = self.optimizer.examples_dropped = 0
        self._wrapped.train()

    def _check_round(self) -> None:
        check_constants(self.model, self._constants)
        # Broken records are dropped and must not be able to stop a run, which everybody would see;
        # only many together, and no other.
        if self.optimizer.examples_dropped == self.optimizer.examples_seen >= _MANY:
            raise PrivflError(
                "loss() or its gradient is NaN or infinite for every record of the round; look for "
                "log(0), division by 0 or unscaled inputs"
            )

    def _sample(self) -> NDArray[np.int64]:
        return poisson_sample(self.records, self._recipe.sampling_rate, self._randomness)

    def _go_through(self, indices: NDArray[np.int64], use: Callable[[], _Made]) -> _Made:
        """One logical step: what ``use`` makes of a Poisson batch, which is gone through in
        pieces that fit into memory.
        """
        self.optimizer.forget_unfinished_step()
        for start in range(0, len(indices), self._piece):
            piece = indices[start : start + self._piece]
            self._backward(*self._batch(piece))
            made = self._advance(use, last=start + self._piece >= len(indices))
        if len(indices) == 0:
            # An empty batch is a step like any other: its sum is zero and gets the same noise. The
            # user's code never sees it.
            for p in self._parameters:
                p.grad_sample = p.new_zeros((0, *p.shape))  # type: ignore[attr-defined]
            made = self._advance(use, last=True)
        return made

    def _advance(self, use: Callable[[], _Made], *, last: bool) -> _Made:
        self.optimizer.signal_skip_step(do_skip=not last)
        made = use()
        self.optimizer.zero_grad(set_to_none=True)
        return made

    def _backward(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Per-example gradients of one physical batch, one for each record."""
        records = len(inputs)
        # Values and not torch's counters of changes, which do not see what goes through p.data.
        before = [p.detach().clone() for p in self._parameters]
        loss = self._loss(self._wrapped(inputs), targets)
        if loss.ndim != 0:
            raise PrivflError(
                f"loss() must return the mean over the batch, a single number; it returned shape "
                f"{tuple(loss.shape)}"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        for name, p, value in zip(self._names, self._parameters, before, strict=True):
            gradient = getattr(p, "grad_sample", None)
            if gradient is None:
                raise PrivflError(
                    f"parameter '{name}' of model() took no part in the forward pass; use it, or "
                    f"freeze it with requires_grad=False"
                )
            if len(gradient) != records:
                raise PrivflError(
                    f"parameter '{name}' of model() saw {len(gradient)} rows for {records} "
                    f"records: parts of a record are folded into the batch, "
                    "and each would be clipped by itself; keep the records in the first dimension"
                )
            if not torch.equal(p.detach().nan_to_num(), value.nan_to_num()):
                raise PrivflError(
                    f"the forward pass of model() changes parameter '{name}' without clipping or "
                    f"noise (max_norm of an Embedding?)"
                )

    def _try_isolation(self) -> None:
        """Check on a few records, spread over the data set, that each has its own gradient;
        nothing of it is kept.
        """
        indices = np.unique(np.linspace(0, self.records - 1, TRIED).astype(np.int64))
        inputs, targets = self._batch(indices)
        self._try_shape(inputs)

        def gradients(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
            self._backward(x, y)
            rows = [p.grad_sample.detach() for p in self._parameters]  # type: ignore[attr-defined]
            for p in self._parameters:
                p.grad = p.grad_sample = None  # type: ignore[attr-defined]
            return rows

        self._wrapped.train()
        check_isolation(self._wrapped, gradients, inputs, targets, self._recipe.max_grad_norm)
        self.optimizer.forget_unfinished_step()
        self.optimizer.zero_grad(set_to_none=True)
        check_constants(self.model, self._constants)

    def _try_shape(self, inputs: torch.Tensor) -> None:
        """Run the model on zeros, so that what it says of a wrong shape can be shown: no record
        is in it.
        """
        shape = tuple(inputs.shape[1:])
        self.model.eval()
        try:
            with torch.no_grad():
                self.model(torch.zeros((2, *shape), dtype=inputs.dtype, device=self._device))
        except Exception as error:
            raise PrivflError(
                f"model() does not take inputs of shape {shape}, {inputs.dtype}: "
                f"{in_one_line(error)}"
            ) from None
        self.model.train()

    def _batch(self, indices: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = _to_pair(_rows(self._train, indices), self._device)
        if len(inputs) != len(indices) or len(targets) != len(indices):
            raise PrivflError(
                f"data() gave {len(inputs)} inputs and {len(targets)} targets for {len(indices)} "
                f"records; a record is one of each"
            )
        return inputs, targets

    def check_outputs(self, dataset: Any) -> None:
        """Refuse a model that couples the records of a batch when it is only used: a metric of
        one record would then depend on the others.

        Raises:
            PrivflError: the outputs of a few records of ``dataset`` depend on which others are in
                the batch.
        """
        indices = np.unique(np.linspace(0, len(dataset) - 1, TRIED).astype(np.int64))
        inputs, _ = _to_pair(_rows(dataset, indices), self._device)
        # One record with values that nobody expects must not be able to stop a run.
        if outputs_coupled(self.model, inputs, least=2):
            raise PrivflError(
                "the output of model() for a held-out record depends on the other records of its "
                "batch, so a metric of private records cannot be "
                "bounded; look for statistics over the batch in model(), perhaps only when it is "
                "not training"
            )

    def outputs(self, dataset: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(model outputs, targets) of all records of ``dataset``, without gradients, on the CPU."""
        self._wrapped.eval()
        outputs, targets = [], []
        with torch.no_grad():
            for start in range(0, len(dataset), _EVALUATION_BATCH):
                indices = np.arange(start, min(start + _EVALUATION_BATCH, len(dataset)))
                inputs, target = _to_pair(_rows(dataset, indices), self._device)
                output = self.model(inputs)
                if not len(output) == len(inputs) == len(target) == len(indices):
                    raise PrivflError(
                        f"{len(indices)} held-out records gave {len(inputs)} inputs, {len(target)} "
                        f"targets and {len(output)} outputs, not "
                        "one of each"
                    )
                outputs.append(output.cpu())
                targets.append(target.cpu())
        self._wrapped.train()
        check_constants(self.model, self._constants)
        return torch.cat(outputs), torch.cat(targets)


def _size(what: str, dataset: Any) -> int:
    try:
        return len(dataset)
    except TypeError as error:
        raise PrivflError(
            f"data() must return map-style data sets (with len() and [index]); {what} is a "
            f"{type(dataset).__name__}"
        ) from error


def _rows(dataset: Any, indices: NDArray[np.int64]) -> Sequence[Any]:
    if isinstance(dataset, TensorDataset):
        return dataset[torch.from_numpy(indices)]  # type: ignore[no-any-return]
    fetch = getattr(dataset, "__getitems__", None)
    rows = fetch(indices.tolist()) if fetch is not None else [dataset[int(i)] for i in indices]
    return default_collate(rows)  # type: ignore[no-any-return]


def _to_pair(rows: Sequence[Any], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(rows, list | tuple) or len(rows) != 2:
        raise PrivflError(
            "a record of data() must be a pair (input, target); wrap arrays as "
            "TensorDataset(torch.tensor(x), torch.tensor(y))"
        )
    inputs, targets = rows
    if not isinstance(inputs, torch.Tensor) or not isinstance(targets, torch.Tensor):
        raise PrivflError(
            f"inputs and targets of data() must become tensors; they are {type(inputs).__name__} "
            f"and {type(targets).__name__}"
        )
    if inputs.is_floating_point() and inputs.dtype != torch.float32:
        raise PrivflError(
            f"inputs of data() are {inputs.dtype}, the model is torch.float32; return x.float()"
        )
    return inputs.to(device), targets.to(device)
