"""Sums of int8 products to what they stand for: scales and bias, one launch.

Reference: `reference_rows.scale_sums`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_sums
from .launch import Launch, is_interpreted

_ROWS, _COLUMNS = 8, 512
"""Of a program; 32 numbers in a thread."""


@triton.jit(do_not_specialize=["rows", "column_tiles"])
def scale_sums_kernel(
    sums,  # [N, C]
    row_scales,  # [N]
    column_scales,  # [C]
    bias,  # [C] or None
    out,  # [N, C]
    rows,
    columns,
    column_tiles,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile; consecutive programs lie side by side in the same rows."""
    program = tl.program_id(0)
    row = (program // column_tiles) * ROWS + tl.arange(0, ROWS)
    column = (program % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    row_mask, column_mask = row < rows, column < columns
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    value = tl.load(sums + at, mask=mask, other=0).to(tl.float32)
    value *= tl.load(row_scales + row, mask=row_mask, other=0.0)[:, None]
    value *= tl.load(column_scales + column, mask=column_mask, other=0.0)[None, :]
    if bias is not None:
        value += tl.load(bias + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


def scale_sums_triton(
    sums: Tensor,
    row_scales: Tensor,
    column_scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`reference_rows.scale_sums` in one launch; all tensors contiguous.

    Raises:
        ValueError: shapes, types or strides that the kernel cannot do, with what it can.
    """
    check_sums(sums, row_scales, column_scales, bias)
    if sums.device.type != "cuda" and not is_interpreted():
        raise ValueError(
            f"sums is on {sums.device}; Triton kernels need a CUDA device "
            "(use the torch reference elsewhere)"
        )
    given = {"sums": sums, "row_scales": row_scales, "column_scales": column_scales, "bias": bias}
    for name, x in given.items():
        if x is not None and (x.device != sums.device or not x.is_contiguous()):
            raise ValueError(
                f"{name} must be contiguous and on {sums.device}, got strides {x.stride()} on "
                f"{x.device}"
            )
    out = torch.empty(sums.shape, dtype=dtype, device=sums.device)
    if sums.numel():
        plan_scale_sums(sums, row_scales, column_scales, bias, out).run()
    return out


def plan_scale_sums(
    sums: Tensor, row_scales: Tensor, column_scales: Tensor, bias: Tensor | None, out: Tensor
) -> Launch:
    """The launch for arguments that have been checked."""
    rows, columns = sums.shape
    column_tiles = triton.cdiv(columns, _COLUMNS)
    arguments = {
        "sums": sums,
        "row_scales": row_scales,
        "column_scales": column_scales,
        "bias": bias,
        "out": out,
        "rows": rows,
        "columns": columns,
        "column_tiles": column_tiles,
        "ROWS": _ROWS,
        "COLUMNS": _COLUMNS,
    }
    grid = (triton.cdiv(rows, _ROWS) * column_tiles,)
    return Launch(scale_sums_kernel, grid, arguments, {"num_warps": 4})
