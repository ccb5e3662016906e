"""The operations of the fast decoders, as Triton kernels or as their torch twins."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import reference_channels as twins

_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ChannelOperations:
    """What a fast decoder computes with; see `kernels.reference_channels` for each.

    Args:
        convolve: `convolve_channels`.
        convolve_to_planes: of that name.
        normalise: `normalise_channels`.
    """

    convolve: Callable[..., Tensor]
    convolve_to_planes: Callable[..., Tensor]
    normalise: Callable[..., Tensor | None]


def torch_operations() -> ChannelOperations:
    """The twins: any device and float type, slow."""
    return ChannelOperations(
        twins.convolve_channels, twins.convolve_to_planes, twins.normalise_channels
    )


def triton_operations() -> ChannelOperations:
    """The kernels. Needs Triton."""
    from ...kernels import ops

    return ChannelOperations(
        ops.convolve_channels_triton, ops.convolve_to_planes_triton, ops.normalise_channels_triton
    )


def fast_obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Why the fast decoders cannot run for weights of a type on a device; empty if they can."""
    if device.type != "cuda":
        return f"the weights are on {device.type}, the kernels need a CUDA device"
    if torch.version.hip:
        return "the kernels are for NVIDIA GPUs"
    if dtype not in _DTYPES:
        return f"the weights are {dtype}, the kernels take float16 and bfloat16"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return ""
