"""The feed-forward's middle in one launch: GELU, then eight-bit numbers with a scale for each row.

A row stays in registers between finding its largest value and rounding, so the wide activations
are read once and written once, at a byte each.

Reference: `reference.gelu_round_rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, check_tensors

MOST_COLUMNS = 16384
"""Columns of a row that a program can hold."""


@triton.jit(do_not_specialize=["columns"])
def gelu_round_rows_kernel(x, out, scales, columns, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """One row."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    mask = at < columns
    value = tl.load(x + row.to(tl.int64) * columns + at, mask=mask, other=0.0).to(tl.float32)
    # tanh(y) = 2 sigmoid(2 y) - 1
    inner = 1.5957691216057308 * (value + 0.044715 * value * value * value)
    value = value / (1.0 + tl.exp(-inner))
    scale = tl.maximum(tl.max(tl.abs(value), 0), 1e-12) / LARGEST
    tl.store(out + row.to(tl.int64) * columns + at, (value / scale).to(out.dtype.element_ty), mask)
    tl.store(scales + row, scale)


def gelu_round_rows_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.gelu_round_rows` in one launch.

    Raises:
        ValueError: shapes, types or strides that the kernel cannot do, with what it can.
    """
    check_tensors({"x": x})
    if x.ndim != 2 or not x.is_contiguous() or x.shape[1] > MOST_COLUMNS:
        raise ValueError(
            f"x must be contiguous [rows, at most {MOST_COLUMNS}], got {tuple(x.shape)} with "
            f"strides {x.stride()}"
        )
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    if x.numel():
        plan_gelu_rounding(x, out, scales).run()
    return out, scales


def plan_gelu_rounding(x: Tensor, out: Tensor, scales: Tensor) -> Launch:
    """The launch for arguments that have been checked."""
    block = triton.next_power_of_2(x.shape[1])
    arguments = {
        "x": x,
        "out": out,
        "scales": scales,
        "columns": x.shape[1],
        "LARGEST": torch.finfo(out.dtype).max,
        "BLOCK": block,
    }
    return Launch(
        gelu_round_rows_kernel, (len(x),), arguments, {"num_warps": min(max(block // 1024, 4), 16)}
    )
