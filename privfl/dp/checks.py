"""What a model must not do under DP-SGD, found before the first record is touched."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from opacus.validators import ModuleValidator
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

from privfl.errors import PrivflError, in_one_line

# Records that are tried together and alone, before training.
TRIED = 8
# How far a record's values may move, relative to their norm, when the record is alone. Rounding
# moves those of a smooth model by about 1e-14 in float64 and 1e-6 in float32; units that flip (see
# check_isolation) by sqrt(flips / units), 1e-8 and 5e-4 where units are so many that some always
# do.
_LIMITS = {torch.float64: 1e-6, torch.float32: 1e-2}
# Trials that must all find records coupled before a model is refused.
_TRIALS = 5


def check_model(model: nn.Module) -> None:
    """Refuse models whose layers mix the examples of a batch or keep statistics of them.

    Opacus' own validator looks at layers with trainable parameters only, so a BatchNorm without
    affine parameters, or a frozen one, passes it and still computes its running statistics from the
    records, without noise.

    Raises:
        PrivflError: If the model must not be trained so; the sentence names the layer and a way
            out.
    """
    if not isinstance(model, nn.Module):
        raise PrivflError(
            f"model() must return a torch.nn.Module, it returned {type(model).__name__}"
        )
    for name, module in model.named_modules():
        where = f"layer '{name}'" if name else "the model"
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise PrivflError(
                f"{where} of model() is a {type(module).__name__}, which mixes the records of a "
                "batch and keeps their statistics without noise; use GroupNorm or LayerNorm instead"
            )
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
            raise PrivflError(
                f"{where} of model() keeps running statistics of the records without noise; set "
                "track_running_stats=False"
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise PrivflError(
                f"{where} of model() changes its weights by itself in every forward pass, without "
                "noise; leave max_norm out"
            )
    if not any(p.requires_grad for p in model.parameters()):
        raise PrivflError("model() has no trainable parameter")
    if any(p.dtype != torch.float32 for p in model.parameters() if p.requires_grad):
        raise PrivflError(
            "model() has trainable parameters that are not float32; privfl trains in float32"
        )
    no_tensors = [
        name for name, value in model.state_dict().items() if not isinstance(value, torch.Tensor)
    ]
    if no_tensors:
        raise PrivflError(
            f"'{no_tensors[0]}' in the state_dict of model() is not a tensor, so the model could "
            "not be written in the end"
        )
    model.train()
    errors = ModuleValidator.validate(model, strict=False)
    if errors:
        raise PrivflError(f"model() cannot be trained with DP-SGD: {in_one_line(errors[0])}")


@contextlib.contextmanager
def wrapping(what: str) -> Iterator[None]:
    """While Opacus puts its hooks on a model; it refuses what it cannot treat with one of these
    two errors.

    Raises:
        PrivflError: If Opacus refuses the model, which the sentence calls ``what``.
    """
    # torch warns of hooks on modules whose inputs need no gradient; Opacus' hooks are made for just
    # that.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    try:
        yield
    except (NotImplementedError, ValueError) as error:
        raise PrivflError(f"{what} cannot be trained with DP-SGD: {in_one_line(error)}") from error


def constants(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of everything in the model that is not trained: frozen parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in _untrained(model).items()}


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, kinds, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(
            f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode()
            + tensor.cpu().contiguous().numpy().tobytes()
        )
    return digest.hexdigest()


def _untrained(model: nn.Module) -> dict[str, torch.Tensor]:
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return {**frozen, **dict(model.named_buffers())}


def check_constants(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Refuse a model that changed anything that is not trained: it gets no noise, yet would be
    written with the model.

    Raises:
        PrivflError: If something that is not trained changed; the sentence names it.
    """
    now = _untrained(model)
    for name in [*now, *before]:
        if name not in now or name not in before or not _same(now[name], before[name]):
            raise PrivflError(
                f"'{name}' of model() is not trained but changes when the model is used, and would "
                "carry records without noise; remove it or keep it constant"
            )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and bool(torch.eq(one, other).logical_or(one != one).all())
    )


def check_isolation(
    model: nn.Module,
    gradients: Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]],
    inputs: torch.Tensor,
    targets: torch.Tensor,
    max_grad_norm: float,
) -> None:
    """Refuse a model or a loss in which a record's gradient depends on its neighbours.

    Clipping bounds what one record adds only if its gradient is its own.
    ``F.cross_entropy(weight=...)`` divides by the weights of the whole batch, ``mse_loss`` of
    shapes (B, 1) and (B,) pairs every record with every other, and ``x - x.mean(0)`` mixes them in
    the model. Each record's gradient in the batch is compared with its gradient alone, one record
    after the other, in float64.

    Guarantee: A model that does not couple its records is refused in fewer than 1e-6 of all
    starts. A batch is multiplied by another kernel than a single record and its products are summed
    in another order, which moves the input z of a ReLU by about u |z|, u the unit roundoff. If that
    carries z across 0, the unit flips and the gradient changes by its whole share, about
    1 / sqrt(units), however small u is. The density of z at 0 is about 1 / |z|, so that a unit
    flips for a record with probability about u. In float32, u = 6e-8, that is 8 * 13333 * u = 6e-3
    of the starts with 13333 units (measured: 7e-3); in float64 it is 1e-10 with 10^5 units. But z
    may be 0 up to rounding by construction, as with equal weights on the output of a LayerNorm,
    and then a flip is likely whatever u is. Therefore a model is refused only if records are
    coupled in all of five trials, the last four of them with parameters and inputs changed at
    random by 1 %. That makes such a z 1 % of what is usual and a flip 100 times as likely as u:
    1e-8 a trial. Even if rounding moves z by 10^5 times u |z|, as in deep models, four in a row
    have probability (1e-3)^4. Coupling is a property of the code and stays. A model that does not
    run in float64 is tried in float32, with a limit above what many flips add up to; a single unit
    exceeds it only among fewer than 10^4, which gives (8 * 10^4 * u)^5 = 3e-12 where z is not 0 by
    construction.

    Args:
        model: The model, in training mode. Its parameters are changed and put back.
        gradients: Per-example gradients of a batch, one tensor of shape (batch, ...) for each
            trained parameter.
        inputs: At least two different records, shape (records, ...).
        targets: Their targets, shape (records, ...).
        max_grad_norm: The clipping norm. Differences below 1e-9 of it are taken for rounding.

    Raises:
        PrivflError: If a gradient depends on the other records, or if the loss or its gradient is
            not finite for every record.
    """

    def compare(x: torch.Tensor) -> _Comparison | None:
        before = _norms(gradients(x, targets))
        together = gradients(x, targets)
        if not _alike(before, _norms(together)):
            return None
        return _Comparison.of(
            together,
            lambda i: gradients(x[i : i + 1], targets[i : i + 1]),
            floor=1e-3 * max_grad_norm,
        )

    with torch.random.fork_rng():
        # In the precision of training: what overflows here may be finite in the trials below.
        if not _norms(gradients(inputs, targets)).isfinite().all(dim=1).any():
            raise PrivflError(
                "loss() or its gradient is NaN or infinite for every record tried; look for "
                "log(0), division by 0 or unscaled inputs"
            )
        coupled = _coupled(model, compare, inputs)
        if coupled is None:
            # Dropout makes two passes differ: switch it off, in all modules but those whose
            # gradients Opacus takes.
            for module in model.modules():
                module.training = any(True for _ in module.parameters(recurse=False))
            coupled = _coupled(model, compare, inputs)
            model.train()
    if coupled:
        raise PrivflError(
            "a record's gradient depends on the other records of its batch, so clipping does not "
            "bound it; look for statistics over the batch in model(), and in loss() for weight= of "
            "cross_entropy (multiply per-record losses by weights instead) or shapes that broadcast"
        )


def check_neighbours(model: nn.Module, loader: DataLoader[Any]) -> None:
    """Refuse a model of a user's own loop whose outputs for a record depend on its neighbours.

    As far as that can be tried: a few records together and alone, in evaluation mode; only where
    the first part of a batch is a tensor that is all the model wants, and where two passes give the
    same. What the loop does with outputs, its loss above all, is not seen here. Trials, limits and
    the rate of false alarms are those of :func:`check_isolation`.

    Raises:
        PrivflError: If an output depends on the other records.
    """
    size = len(loader.dataset)  # type: ignore[arg-type]
    records = [loader.dataset[i] for i in range(min(TRIED, size))]
    batch = loader.collate_fn(records) if records else None
    inputs = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
    if not isinstance(inputs, torch.Tensor) or len(inputs) != len(records):
        return
    try:
        coupled = outputs_coupled(model, inputs.to(next(model.parameters()).device))
    except Exception:
        return
    if coupled:
        raise PrivflError(
            "module's output for a record depends on the other records of its batch, so clipping "
            "does not bound what one record changes; look for statistics over the batch, as x - "
            "x.mean(0)"
        )


def outputs_coupled(model: nn.Module, inputs: torch.Tensor, *, least: int = 1) -> bool:
    """Whether the outputs for ``least`` records or more depend on the other records of ``inputs``.

    In evaluation mode. False also where that cannot be told: the outputs are no tensor with a row
    for each record, or two passes differ. Trials, limits and the rate of false alarms are those of
    :func:`check_isolation`.
    """

    def compare(x: torch.Tensor) -> _Comparison | None:
        before, together = model(x), model(x)
        alone = [model(x[i : i + 1]) for i in range(len(x))]
        if any(not isinstance(o, torch.Tensor) or o.dim() == 0 for o in (before, together, *alone)):
            return None
        if len(together) != len(x) or any(a.shape != (1, *together.shape[1:]) for a in alone):
            return None
        if not _alike(_norms([before]), _norms([together])):
            return None
        return _Comparison.of([together], lambda i: [alone[i]], floor=1e-3)

    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            return bool(_coupled(model, compare, inputs, least))
    finally:
        model.train(training)


@dataclass(frozen=True)
class _Comparison:
    """Of each record together with the others and alone, shape (records,), in float64."""

    distance: torch.Tensor
    scale: torch.Tensor  # What the limit is relative to.
    finite: torch.Tensor  # Whether the record's values are, together.

    @classmethod
    def of(
        cls,
        together: Sequence[torch.Tensor],
        alone: Callable[[int], Sequence[torch.Tensor]],
        *,
        floor: float,
    ) -> _Comparison:
        """From tensors of shape (records, ...) and, by number, those of a record alone (1, ...)."""
        norms = torch.stack([cls._norms(together, i, alone(i)) for i in range(len(together[0]))])
        distance, norm, norm_alone = norms.T
        return cls(distance, floor + torch.maximum(norm, norm_alone), norm.isfinite())

    @staticmethod
    def _norms(
        together: Sequence[torch.Tensor], i: int, alone: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Norms over all tensors of a record's difference, of it together and of it alone."""
        parts = [
            [_norm(t[i] - a[0]), _norm(t[i]), _norm(a[0])]
            for t, a in zip(together, alone, strict=True)
        ]
        return _norm(torch.tensor(parts, dtype=torch.float64), dim=0)


_Compare = Callable[[torch.Tensor], _Comparison | None]


def _coupled(
    model: nn.Module, compare: _Compare, inputs: torch.Tensor, least: int = 1
) -> bool | None:
    """Whether ``least`` records are coupled in all trials; None if two passes differ."""
    try:
        return _coupled_in(torch.float64, model, compare, inputs, least)
    except PrivflError:
        raise
    except Exception:
        # Compiled code may insist on float32, and some devices have nothing else.
        return _coupled_in(torch.float32, model, compare, inputs, least)


def _coupled_in(
    precision: torch.dtype, model: nn.Module, compare: _Compare, inputs: torch.Tensor, least: int
) -> bool | None:
    finite: torch.Tensor | None = None
    for trial in range(_TRIALS):
        with _probe(model, precision, changed=trial > 0):
            comparison = compare(_probe_inputs(inputs, precision, changed=trial > 0))
        if comparison is None:
            return None
        finite = comparison.finite if finite is None else finite
        # Values that are NaN alone, or in a changed model, count as too far.
        close = comparison.distance <= _LIMITS[precision] * comparison.scale
        if int((finite & ~close).sum()) < least:
            return False
    return True


class _InFloat64(TorchFunctionMode):
    """Runs in float64 what a model and its loss run in a smaller type, whatever type they name.

    A class weight in float32 beside outputs in float64 stops cross_entropy, and one layer that
    calls float() brings the rounding of float32 back.
    """

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Widen arguments and result, except a tensor that is written to: it must stay itself."""
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if name in ("__get__", "__set__") or "out" in kwargs:
            return function(*args, **kwargs)
        written = args[:1] if _writes(name) else ()
        others = map(_widened, args[len(written) :])
        options = {key: _widened(value) for key, value in kwargs.items()}
        result = _CASTS.get(function, function)(*written, *others, **options)
        return result if written else _widened(result)


_SMALL = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = dict.fromkeys(
    (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16), torch.Tensor.double
)


def _widened(value: Any) -> Any:
    """A tensor or a type in float64; also those in a list, as of what torch.cat joins."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.dtype in _SMALL else value
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _SMALL else value
    return type(value)(map(_widened, value)) if type(value) in (list, tuple) else value


def _writes(name: str) -> bool:
    """Whether a function of torch writes to its first argument: add_, __setitem__, __iadd__."""
    if name.startswith("__"):
        return name == "__setitem__" or name.startswith("__i")
    return name.endswith("_")


@contextlib.contextmanager
def _probe(model: nn.Module, precision: torch.dtype, *, changed: bool) -> Iterator[None]:
    """The trained parameters in ``precision``, ``changed`` at random by 1 %; put back at exit."""
    before = [(p, p.data, p.grad) for p in model.parameters() if p.requires_grad]
    try:
        for p, value, _ in before:
            p.grad = None
            p.data = value.to(precision, copy=True)
            if changed:
                p.data.mul_(1 + 0.01 * torch.randn_like(p.data)).add_(
                    torch.randn_like(p.data), alpha=1e-3
                )
        with _InFloat64() if precision == torch.float64 else contextlib.nullcontext():
            yield
    finally:
        for p, value, gradient in before:
            p.grad = None
            p.data = value
            p.grad = gradient


def _probe_inputs(inputs: torch.Tensor, precision: torch.dtype, *, changed: bool) -> torch.Tensor:
    """The same for inputs; zeros stay zeros, for a logarithm or a mask may hang on them."""
    if not inputs.is_floating_point():
        return inputs
    inputs = inputs.to(precision)
    return inputs * (1 + 0.01 * torch.randn_like(inputs)) if changed else inputs


def _norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm of each row of each tensor, shape (rows, tensors), in float64."""
    return torch.stack([_norm(t.reshape(len(t), -1), dim=1) for t in tensors], dim=1)


def _norm(values: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(values, dim=dim, dtype=torch.float64)
    return norm


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two passes gave the same but for rounding, which on a GPU is not the same in each."""
    return torch.allclose(one, other, rtol=1e-9, atol=1e-12, equal_nan=True)
