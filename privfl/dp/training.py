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
from privfl.dp.clipping import ExampleClipper, samples_of, set_samples
from privfl.dp.optimizer import OwnNoise, SumOptimizer, flat, split
from privfl.errors import PrivflError, in_one_line
from privfl.noise.randomness import Randomness, poisson_sample

# Per-example gradients of one physical batch may take this much memory; larger Poisson batches are
# processed in pieces.
_GRADIENT_BYTES = 512 << 20
_EVALUATION_BATCH = 4096
# Fewer records with a gradient that is not finite never stop a round.
_MANY = 20

_Result = TypeVar("_Result")
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


@dataclass(frozen=True)
class Recipe:
    """How a site trains.

    Attributes:
        sampling_rate: the public q, at which each record takes part in a step; never derived from
            batch sizes.
        noise_multiplier: sigma of the noise that every local step gets here, in units of the
            clipping norm; None if steps are sums over all sites, which get their noise elsewhere.
        max_grad_norm: C, the clipping norm.
        local_steps: steps of a round.
        optimizer: the name of the optimizer: sgd, adam or adamw.
        optimizer_options: its keyword arguments.
    """

    sampling_rate: float
    noise_multiplier: float | None
    max_grad_norm: float
    local_steps: int
    optimizer: str
    optimizer_options: Mapping[str, float]


class LocalTraining:
    """DP-SGD on one site's records, for the whole run.

    Args:
        model: the user's model, which is trained in place.
        loss: the mean loss of a batch of outputs and targets.
        train: a map-style data set of pairs (input, target).
        recipe: how the site trains.
        randomness: where samples come from, and the noise if it is this site's own.
        device: where the model and the batches lie.

    Attributes:
        records: how many training records there are.
        parameters: how many numbers are trained.
        optimizer: makes the steps, and counts the per-example gradients it clipped.

    Raises:
        PrivflError: If the model, the loss or the number of records does not fit DP-SGD.
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
                f"{expected:.2g} records a step on average; raise sampling_rate to at least "
                f"{1.0 / self.records:.2g}, better ten times that"
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
        self._noise = (
            None
            if recipe.noise_multiplier is None
            else OwnNoise(randomness, charge=_charged_by_the_agent)
        )
        self._batches_summed = 0
        self.optimizer = self._make_optimizer(expected)
        self._constants = constants(self.model)
        self._try_isolation()

    def _make_optimizer(self, expected: float) -> SumOptimizer:
        recipe = self._recipe
        return SumOptimizer(
            _OPTIMIZERS[recipe.optimizer](self._parameters, **recipe.optimizer_options),
            clipper=ExampleClipper(exact=self._noise is None),
            release=self._noise,
            noise_multiplier=recipe.noise_multiplier or 0.0,
            max_grad_norm=recipe.max_grad_norm,
            expected_batch_size=expected,
        )

    @property
    def draws(self) -> int:
        """How often noise was drawn, or a batch where sums get their noise elsewhere; the agent
        compares it with the steps that it charged.
        """
        return self._batches_summed if self._noise is None else self._noise.draws

    def flat(self) -> NDArray[np.float32]:
        """The trainable parameters as one vector of shape (parameters,)."""
        return flat(self._parameters).numpy()

    def constants_digest(self) -> str:
        """SHA-256 over everything in the model that is not trained; it must be the same at all
        sites.
        """
        return digest_of(self._constants)

    def load(self, replica: NDArray[np.float32]) -> None:
        """Put a vector of shape (parameters,) into the model."""
        vector = torch.from_numpy(replica).to(self._device)
        with torch.no_grad():
            for p, values in zip(self._parameters, split(vector, self._parameters), strict=True):
                p.copy_(values)

    def train_round(self, replica: NDArray[np.float32]) -> NDArray[np.float32]:
        """``local_steps`` steps of DP-SGD from ``replica``; the update (end - start). Both of
        shape (parameters,).

        Guarantee: Every step, of a Poisson sample of its own, gets Gaussian noise of
            ``noise_multiplier`` times the sensitivity of its sum. The optimizer's state starts
            anew, so an update is a function of the replica and this round's records only.

        Raises:
            PrivflError: If the loss is not finite for every record of many, the parameters are not
                finite in the end, or the model changed a buffer.
        """
        self._start_round(replica)
        self.optimizer.original_optimizer.state.clear()
        for _ in range(self._recipe.local_steps):
            self._go_through(self._sample(), self.optimizer.step)
        self._check_round()
        update = self.flat() - replica
        if not np.isfinite(update).all():
            raise PrivflError("the parameters became NaN or infinite; lower optimizer.lr")
        return update

    def sum_gradients(self, replica: NDArray[np.float32]) -> NDArray[np.float64]:
        """The sum of clipped gradients of a new Poisson sample at ``replica``, without noise. Both
        of shape (parameters,).

        Guarantee: One record changes the sum by at most ``max_grad_norm * (1 + CLIP_MARGIN)`` in
            Euclidean length.

        Raises:
            PrivflError: If the loss is not finite for every record of many, or the model changed a
                buffer.
        """
        self._start_round(replica)
        total = self._go_through(self._sample(), self.optimizer.collect)
        self._check_round()
        self._batches_summed += 1
        assert total is not None
        return total

    def follow(self, gradient: NDArray[np.float64]) -> NDArray[np.float32]:
        """One optimizer step along ``gradient``, the same mean at all sites; the new replica.

        Both of shape (parameters,). The optimizer's state goes on from step to step: it is a
        function of earlier sums alone, and the same everywhere.

        Raises:
            PrivflError: If the parameters are not finite afterwards.
        """
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
        # Records whose gradient is not finite are dropped. They must not be able to stop a run,
        # which everybody would see, unless they are many and there is no other record.
        if self.optimizer.examples_dropped == self.optimizer.examples_seen >= _MANY:
            raise PrivflError(
                "loss() or its gradient is NaN or infinite for every record of the round; look for "
                "log(0), division by 0 or unscaled inputs"
            )

    def _sample(self) -> NDArray[np.int64]:
        return poisson_sample(self.records, self._recipe.sampling_rate, self._randomness)

    def _go_through(self, indices: NDArray[np.int64], use: Callable[[], _Result]) -> _Result:
        """One logical step: what ``use`` makes of the records ``indices``, taken in pieces that
        fit into memory.
        """
        self.optimizer.forget_unfinished_step()
        for start in range(0, len(indices), self._piece):
            piece = indices[start : start + self._piece]
            self._backward(*self._batch(piece))
            result = self._advance(use, last=start + self._piece >= len(indices))
        if len(indices) == 0:
            # An empty batch is a step like any other: its sum is zero and gets the same noise. The
            # user's code never sees it.
            for p in self._parameters:
                set_samples(p, p.new_zeros((0, *p.shape)))
            result = self._advance(use, last=True)
        return result

    def _advance(self, use: Callable[[], _Result], *, last: bool) -> _Result:
        self.optimizer.signal_skip_step(do_skip=not last)
        result = use()
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def _backward(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Per-example gradients of one physical batch, one for each record."""
        records = len(inputs)
        # Values and not torch's counters of changes, which do not see what goes through p.data.
        before = [p.detach().clone() for p in self._parameters]
        loss = self._loss(self._wrapped(inputs), targets)
        if loss.ndim != 0:
            raise PrivflError(
                "loss() must return the mean over the batch, a single number; it returned shape "
                f"{tuple(loss.shape)}"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        for name, p, value in zip(self._names, self._parameters, before, strict=True):
            gradient = samples_of(p)
            if gradient is None:
                raise PrivflError(
                    f"parameter '{name}' of model() took no part in the forward pass; use it, or "
                    "freeze it with requires_grad=False"
                )
            if len(gradient) != records:
                raise PrivflError(
                    f"parameter '{name}' of model() saw {len(gradient)} rows for {records} "
                    "records, so none has a gradient of its own: keep the records in the first "
                    "dimension of every layer's input, and give a layer that is used without them, "
                    "as for positions, a row for each (positions.expand(len(x), -1))"
                )
            if not torch.equal(p.detach().nan_to_num(), value.nan_to_num()):
                raise PrivflError(
                    f"the forward pass of model() changes parameter '{name}' without clipping or "
                    "noise (max_norm of an Embedding?)"
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
        """Run the model on zeros, so that its message on a wrong shape can be shown: it quotes no
        record.
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
                "records; a record is one of each"
            )
        return inputs, targets

    def check_outputs(self, dataset: Any) -> None:
        """Refuse a model that couples the records of a batch when it is only used: a metric of
        one record would then depend on the others.

        Raises:
            PrivflError: If the outputs of some records of ``dataset`` depend on which others are
                in the batch.
        """
        indices = np.unique(np.linspace(0, len(dataset) - 1, TRIED).astype(np.int64))
        inputs, _ = _to_pair(_rows(dataset, indices), self._device)
        # One record with values that nobody expects must not be able to stop a run.
        if outputs_coupled(self.model, inputs, least=2):
            raise PrivflError(
                "the output of model() for an evaluation record depends on the other records of "
                "its batch, so a metric of private records cannot be bounded; look for statistics "
                "over the batch in model(), perhaps only when it is not training"
            )

    def outputs(self, dataset: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(model outputs, targets) of all records of ``dataset``, without gradients, on the CPU;
        both of shape (records, ...).

        Raises:
            PrivflError: If a record does not give one input, one target and one output, or the
                model changed a buffer.
        """
        self._wrapped.eval()
        outputs, targets = [], []
        with torch.no_grad():
            for start in range(0, len(dataset), _EVALUATION_BATCH):
                indices = np.arange(start, min(start + _EVALUATION_BATCH, len(dataset)))
                inputs, target = _to_pair(_rows(dataset, indices), self._device)
                output = self.model(inputs)
                if not len(output) == len(inputs) == len(target) == len(indices):
                    raise PrivflError(
                        f"{len(indices)} evaluation records gave {len(inputs)} inputs, "
                        f"{len(target)} targets and {len(output)} outputs, not one of each"
                    )
                outputs.append(output.cpu())
                targets.append(target.cpu())
        self._wrapped.train()
        check_constants(self.model, self._constants)
        return torch.cat(outputs), torch.cat(targets)


def _charged_by_the_agent() -> None:
    """The agent charges a round before it asks for it, and compares the draws afterwards."""


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
