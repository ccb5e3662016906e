"""The operations of the fast decoders, as Triton kernels or as their torch twins."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import reference_channels as twins

_DTYPES = (torch.float16, torch.bfloat16)
_HOPPER = (9, 0)


@dataclass(frozen=True)
class ChannelOperations:
    """What a fast decoder computes with; see `kernels.reference_channels` for each.

    Args:
        convolve: `convolve_channels`.
        convolve_to_planes: of that name.
        normalise: `normalise_channels`.
        most_channels: causal convolutions up to this width take `convolve`, wider ones cuDNN's. On
            an H200, bfloat16, cuDNN runs 48 channels (12 frames of 416x240) at 130 TFLOP/s, where
            the kernel makes 230, and 96 (6 frames of 208x120) at 280, where the one for Hopper
            makes 450.
    """

    convolve: Callable[..., Tensor]
    convolve_to_planes: Callable[..., Tensor]
    normalise: Callable[..., Tensor | None]
    most_channels: int = 64


def torch_operations(device: torch.device | None = None) -> ChannelOperations:
    """The twins: any device and float type, slow."""
    return ChannelOperations(
        twins.convolve_channels, twins.convolve_to_planes, twins.normalise_channels
    )


def triton_operations(device: torch.device | None = None) -> ChannelOperations:
    """The kernels, for a GPU or for any that has them. Needs Triton."""
    from ...kernels import ops

    is_hopper = device is not None and torch.cuda.get_device_capability(device) == _HOPPER
    return ChannelOperations(
        ops.convolve_channels_triton,
        ops.convolve_to_planes_triton,
        ops.normalise_channels_triton,
        most_channels=96 if is_hopper else 64,
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
