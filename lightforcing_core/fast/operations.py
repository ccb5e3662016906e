"""The fused operations of a forward, from Triton on a GPU and from plain torch elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels import reference, reference_repeated, reference_rows
from ..backends import triton_obstacles

FUSED_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class FusedOperations:
    """With the signatures of their twins in `kernels.reference...`.

    Attributes:
        repeated_head_dims: that `attend_repeated` does; None: any.
    """

    add_norm: Callable[..., Any]
    rms_norm: Callable[..., Tensor]
    round_rows: Callable[..., tuple[Tensor, Tensor]]
    project_blocks: Callable[..., tuple[Tensor, Tensor | None]]
    scale_sums: Callable[..., Tensor]
    attend_repeated: Callable[..., Tensor]
    repeated_head_dims: tuple[int, ...] | None


def fused_operations(device: torch.device) -> FusedOperations:
    """Those of a device; `fused_obstacles` says whether there are any."""
    if device.type != "cuda":
        return FusedOperations(
            reference_rows.add_norm,
            reference_rows.rms_norm,
            reference_rows.round_rows,
            reference.project_blocks,
            reference_rows.scale_sums,
            reference_repeated.attend_repeated,
            None,
        )
    from ...kernels import ops
    from ...kernels.triton_repeated import HEAD_DIMS

    return FusedOperations(
        ops.add_norm_triton,
        ops.rms_norm_triton,
        ops.round_rows_triton,
        ops.project_blocks_triton,
        ops.scale_sums_triton,
        ops.attend_repeated_triton,
        HEAD_DIMS,
    )


def fused_obstacles(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why a model of this type on this device cannot use the kernels; empty: it can."""
    if device.type != "cuda":
        return [f"the kernels need a CUDA device, this run is on {device}"]
    obstacles = triton_obstacles()
    if dtype not in FUSED_DTYPES:
        obstacles.append(
            "the kernels do bfloat16 and float16, the model computes in "
            f"{str(dtype).removeprefix('torch.')}"
        )
    return obstacles
