"""What a model must not do under DP-SGD, found before the first record is touched."""

from __future__ import annotations

import torch
from opacus.validators import ModuleValidator
from torch import nn

from privfl.errors import PrivflError, in_one_line


def check_model(model: nn.Module) -> None:
    """Refuse models whose layers mix the examples of a batch or keep statistics of them.

    Opacus' own validator looks at layers with trainable parameters only, so a BatchNorm without affine parameters, or a frozen
    one, passes it and still computes its running statistics from the records, without noise.

    Raises:
        PrivflError: naming the layer and the way to mend it.
    """
    if not isinstance(model, nn.Module):
        raise PrivflError(f"model() must return a torch.nn.Module, it returned {type(model).__name__}")
    for name, module in model.named_modules():
        where = f"layer '{name}'" if name else "the model"
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise PrivflError(
                f"{where} of model() is a {type(module).__name__}, which mixes the records of a batch and keeps their statistics without "
                "noise; use GroupNorm or LayerNorm instead"
            )
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
            raise PrivflError(
                f"{where} of model() keeps running statistics of the records without noise; set track_running_stats=False"
            )
    if not any(p.requires_grad for p in model.parameters()):
        raise PrivflError("model() has no trainable parameter")
    if any(p.dtype != torch.float32 for p in model.parameters() if p.requires_grad):
        raise PrivflError("model() has trainable parameters that are not float32; privfl trains in float32")
    model.train()
    errors = ModuleValidator.validate(model, strict=False)
    if errors:
        raise PrivflError(f"model() cannot be trained with DP-SGD: {in_one_line(errors[0])}")


def fingerprint_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all buffers, to be compared by :func:`check_buffers`."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def check_buffers(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Refuse a model that changed a buffer while training: buffers get no noise, yet would be written with the model.

    Raises:
        PrivflError: naming the buffer.
    """
    for name, buffer in model.named_buffers():
        earlier = before.get(name)
        if earlier is None or earlier.shape != buffer.shape or not torch.equal(earlier, buffer):
            raise PrivflError(
                f"buffer '{name}' of model() changes during training and would carry records without noise; remove it or freeze it"
            )
