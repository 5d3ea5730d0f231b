"""What a model must not do under DP-SGD, found before the first record is touched."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from opacus.validators import ModuleValidator
from torch import nn
from torch.utils.data import DataLoader

from privfl.errors import PrivflError, in_one_line

# Records that are tried together and alone, before training.
TRIED = 8


def check_model(model: nn.Module) -> None:
    """Refuse models whose layers mix the examples of a batch or keep statistics of them.

    Opacus' own validator looks at layers with trainable parameters only, so a BatchNorm without
    affine parameters, or a frozen one, passes it and still computes its running statistics from the
    records, without noise.

    Raises:
        PrivflError: naming the layer and the way to mend it.
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
                f"batch and keeps their statistics without "
                "noise; use GroupNorm or LayerNorm instead"
            )
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
            raise PrivflError(
                f"{where} of model() keeps running statistics of the records without noise; set "
                f"track_running_stats=False"
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise PrivflError(
                f"{where} of model() changes its weights by itself in every forward pass, without "
                f"noise; leave max_norm out"
            )
    if not any(p.requires_grad for p in model.parameters()):
        raise PrivflError("model() has no trainable parameter")
    if any(p.dtype != torch.float32 for p in model.parameters() if p.requires_grad):
        raise PrivflError(
            "model() has trainable parameters that are not float32; privfl trains in float32"
        )
    odd = [
        name for name, value in model.state_dict().items() if not isinstance(value, torch.Tensor)
    ]
    if odd:
        raise PrivflError(
            f"'{odd[0]}' in the state_dict of model() is not a tensor, so the model could not be "
            f"written in the end"
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
        PrivflError: it does; ``what`` is the model's name in the sentence.
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
        PrivflError: naming the buffer or parameter.
    """
    now = _untrained(model)
    for name in [*now, *before]:
        if name not in now or name not in before or not _same(now[name], before[name]):
            raise PrivflError(
                f"'{name}' of model() is not trained but changes when the model is used, and would "
                f"carry records without noise; "
                "remove it or keep it constant"
            )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and bool(torch.eq(one, other).logical_or(one != one).all())
    )


def check_isolation(
    gradients: Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]],
    inputs: torch.Tensor,
    targets: torch.Tensor,
) -> None:
    """Refuse a model or a loss that couples the records of a batch: a record's gradient must not
    depend on its neighbours.

    Clipping bounds what one record adds only if its gradient is its own.
    ``F.cross_entropy(weight=...)`` divides by the weights of the whole batch, ``mse_loss`` of
    shapes (B, 1) and (B,) pairs every record with every other, and ``x - x.mean(0)`` mixes them in
    the model.

    Args:
        gradients: per-example gradients of a batch, one tensor of shape (batch, ...) for each
            parameter.
        inputs, targets: at least two different records.

    Raises:
        PrivflError: coupled, or NaN for every record.
    """
    together = _rows(gradients(inputs, targets))
    alone = torch.cat(
        [_rows(gradients(inputs[i : i + 1], targets[i : i + 1])) for i in range(len(inputs))]
    )
    fine = torch.isfinite(together).all(dim=1) & torch.isfinite(alone).all(dim=1)
    if not fine.any():
        raise PrivflError(
            "loss() or its gradient is NaN or infinite for every record tried; look for log(0), "
            "division by 0 or unscaled inputs"
        )
    distance = (together[fine] - alone[fine]).norm(dim=1)
    if (
        distance
        > 1e-3 * (1e-3 + torch.maximum(together[fine].norm(dim=1), alone[fine].norm(dim=1)))
    ).any():
        raise PrivflError(
            "a record's gradient depends on the other records of its batch, so clipping does not "
            "bound it; look for statistics over the batch in "
            "model(), and in loss() for weight= of cross_entropy (multiply per-record losses by "
            "weights instead) or shapes that broadcast"
        )


def check_neighbours(model: nn.Module, loader: DataLoader[Any]) -> None:
    """Refuse a model of a user's own loop whose outputs for a record depend on its neighbours,
    as far as that can be tried.

    A few records together and alone; only where the first part of a batch is a tensor that is all
    the model wants. What the loop does with outputs, its loss above all, is not seen here.

    Raises:
        PrivflError: they do.
    """
    records = [loader.dataset[i] for i in range(min(TRIED, len(loader.dataset)))]  # type: ignore[arg-type]
    batch = loader.collate_fn(records) if records else None
    inputs = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
    if not isinstance(inputs, torch.Tensor) or len(inputs) != len(records):
        return
    where, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.no_grad():
            inputs = inputs.to(where)
            together = model(inputs)
            alone = torch.cat([model(inputs[i : i + 1]) for i in range(len(inputs))])
    except Exception:
        return
    finally:
        model.train(training)
    if not isinstance(together, torch.Tensor) or together.shape != alone.shape:
        return
    distance = (together - alone).abs().double()
    if (distance > 1e-3 * (1e-3 + together.abs().double())).any():
        raise PrivflError(
            "module's output for a record depends on the other records of its batch, so clipping "
            "does not bound what one record changes; look for "
            "statistics over the batch, as x - x.mean(0)"
        )


def _rows(gradients: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([g.flatten(1).double() for g in gradients], dim=1)
