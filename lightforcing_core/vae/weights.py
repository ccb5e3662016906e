"""Strict loading of state dicts, with one message that says everything that does not fit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import UserError

_MAX_NAMED = 4
_MAX_SIZE = 2**14  # the widest layer of the published VAEs has 512 channels


def describe_problems(problems: list[str]) -> str:
    """Join problems to one line that names the first few and counts the rest."""
    more = f" and {len(problems) - _MAX_NAMED} more" if len(problems) > _MAX_NAMED else ""
    return "; ".join(problems[:_MAX_NAMED]) + more


def require_shapes(tensors: Mapping[str, Tensor], dims: Mapping[str, int], *, do: str) -> None:
    """Raise unless tensors that sizes are read from can be weights of convolutions.

    Args:
        tensors: the state dict; must hold all of `dims`.
        dims: how many dimensions each must have, by name.
        do: what the user can do, for the message.

    Raises:
        UserError: another number of dimensions, a size of 0 or beyond every VAE, or no floats.
    """
    for name, count in dims.items():
        tensor = tensors[name]
        shape = list(tensor.shape)
        if len(shape) != count or not all(1 <= size <= _MAX_SIZE for size in shape):
            raise UserError(
                f"{name} has shape {shape}, expected {count} sizes from 1 to {_MAX_SIZE}; {do}"
            )
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{name} holds {kind}, expected floating-point numbers; {do}")


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], *, what: str, do: str) -> None:
    """Copy a state dict into a module; every tensor must fit, none may be missing or left over.

    Args:
        module: where the weights go. May be on the meta device; it is then allocated on the
            tensors' device, without drawing random numbers.
        tensors: the state dict; values are converted to the module's dtype.
        what: what the file should be, for the message.
        do: what the user can do, for the message.

    Raises:
        UserError: something is missing, unexpected, of another shape, or not a finite number.
    """
    own = module.state_dict()
    problems = [f"missing {name}" for name in own if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in own]
    problems += [
        f"{name} is {list(tensors[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if problems:
        raise UserError(f"{what} weights do not fit: {describe_problems(problems)}; {do}")
    broken = [name for name in own if not torch.isfinite(tensors[name].float()).all()]
    if broken:
        raise UserError(
            f"{what} weights hold NaN or infinity in {describe_problems(broken)}; "
            "the file is damaged, fetch it again"
        )
    if any(tensor.is_meta for tensor in own.values()):
        module.to_empty(device=next(iter(tensors.values())).device)
    module.load_state_dict(dict(tensors))
