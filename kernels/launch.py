"""What all Triton launchers share: the launch itself, and what is asked of tensors and device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETER_CAPABILITY = 80
"""Configurations that the interpreter uses; any would do."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch, complete: to be run, or to be compiled for a GPU that is not there.

    Attributes:
        arguments: every kernel parameter by name; tensors on the meta device serve for compiling.
        options: num_warps, num_stages.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def compile_options(self) -> dict[str, Any]:
        """Options of the compiler; multiply-adds are fused whatever Triton's default becomes."""
        return self.options | {"enable_fp_fusion": True}

    def run(self) -> None:
        arguments = self.arguments
        if not is_interpreted() and _needs_addresses():
            arguments = {name: _address(value) for name, value in arguments.items()}
        self.kernel[self.grid](**arguments, **self.compile_options)


class _Address(int):
    """Where a tensor lies; Triton takes it for one.

    Triton asks the driver about the address of every tensor that it is given, of numbers it does
    not; and with cudaMallocAsync the driver knows nothing about what is allocated while a graph is
    recorded until that graph runs.
    """

    dtype: torch.dtype

    def data_ptr(self) -> int:
        return int(self)


def takes_addresses() -> bool:
    """Whether the installed Triton takes an `_Address` for a tensor; before 3.6 for a number."""
    major, minor = triton.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (3, 6)


def _needs_addresses() -> bool:
    return (
        torch.cuda.is_current_stream_capturing()
        and torch.cuda.get_allocator_backend() == "cudaMallocAsync"
        and takes_addresses()
    )


def _address(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    address = _Address(value.data_ptr())
    address.dtype = value.dtype
    return address


def strides(name: str, x: Tensor, letters: str) -> dict[str, int]:
    """The leading strides of x as kernel arguments, `<name>_stride_<letter>`.

    The stride of a batch of one is never used; as 0 it has the divisibility that all others need
    for wide loads, whatever the length behind it.
    """
    values = {f"{name}_stride_{letter}": x.stride(i) for i, letter in enumerate(letters)}
    if x.shape[0] == 1:
        values[f"{name}_stride_{letters[0]}"] = 0
    return values


def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 replaces the compiler, which makes CPU tensors acceptable."""
    return bool(triton.knobs.runtime.interpret)


def compute_capability(device: torch.device) -> int:
    """Capability of a CUDA device as one number: 90 for 9.0."""
    if device.type != "cuda":
        return INTERPRETER_CAPABILITY
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def multiprocessors(device: torch.device) -> int:
    """How many programs of one that fills a multiprocessor run at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def check_tensors(tensors: dict[str, Tensor], head_dims: tuple[int, ...] | None = None) -> None:
    """One device that Triton can use, one type that the kernels know, a dense last axis.

    Args:
        tensors: by the name that the message gives them, [..., D].
        head_dims: values of D that the kernel can do; None: any.

    Raises:
        ValueError: names the tensor, what was expected and what was given.
    """
    first_name, first = next(iter(tensors.items()))
    if first.device.type != "cuda" and not is_interpreted():
        raise ValueError(
            f"{first_name} is on {first.device}; Triton kernels need a CUDA device "
            "(use the torch reference elsewhere)"
        )
    for name, x in tensors.items():
        if x.device != first.device or x.dtype != first.dtype:
            raise ValueError(
                f"{name} must be like {first_name}, {first.dtype} on {first.device}, "
                f"got {x.dtype} on {x.device}"
            )
        if x.dtype not in _DTYPES:
            raise ValueError(f"{name} must be bfloat16, float16 or float32, got {x.dtype}")
        if head_dims and x.shape[-1] not in head_dims:
            raise ValueError(f"{name} must have a head dim of {head_dims}, got {x.shape[-1]}")
        if x.stride(-1) != 1:
            raise ValueError(f"{name} must be dense in its last axis, got strides {x.stride()}")
    if first.dtype == torch.bfloat16 and is_interpreted():
        raise ValueError("Triton's interpreter cannot multiply bfloat16; use float16 or float32")
