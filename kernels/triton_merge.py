"""Joins the results of programs that shared a list: a mean weighted by their sums of weights.

Reference: `reference.merge_parts`; FlashDecoding's second step.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .grid import BlockGrid
from .launch import Launch, strides

_ROWS = 16


@triton.jit(
    do_not_specialize=[
        "first_tile", "num_parts", "num_heads", "num_rows", "q_segment_tokens",
        "q_blocks_per_segment",
    ]
)  # fmt: skip
def merge_parts_kernel(
    parts,  # [tiles, parts, Q_BLOCK, D]
    log_sums,  # [tiles, parts, Q_BLOCK]
    out,  # [B, S, H, D]
    out_stride_b,
    out_stride_s,
    out_stride_h,
    first_tile,
    num_parts,
    num_heads,
    num_rows,
    q_segment_tokens,
    q_blocks_per_segment,
    HEAD_DIM: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows of one tile."""
    program = tl.program_id(0)
    tile = program // (Q_BLOCK // ROWS)
    tile_rows = (program % (Q_BLOCK // ROWS)) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, HEAD_DIM)
    first = tile.to(tl.int64) * num_parts * Q_BLOCK
    log_sums += first + tile_rows
    parts += (first + tile_rows[:, None]) * HEAD_DIM + dims[None, :]

    most = tl.full([ROWS], float("-inf"), tl.float32)
    for part in range(num_parts):
        most = tl.maximum(most, tl.load(log_sums + part * Q_BLOCK))
    most = tl.where(most == float("-inf"), 0.0, most)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for part in range(num_parts):
        weight = tl.exp2(tl.load(log_sums + part * Q_BLOCK) - most)
        total += weight
        result += weight[:, None] * tl.load(parts + part * Q_BLOCK * HEAD_DIM)
    # Parts without keys hold zeros.
    result /= tl.where(total == 0.0, 1.0, total)[:, None]

    list_row = first_tile + tile
    q_block = list_row % num_rows
    head = ((list_row // num_rows) % num_heads).to(tl.int64)
    batch = ((list_row // num_rows) // num_heads).to(tl.int64)
    segment = q_block // q_blocks_per_segment
    segment_rows = (q_block % q_blocks_per_segment) * Q_BLOCK + tile_rows
    rows = (segment * q_segment_tokens + segment_rows).to(tl.int64)
    out += batch * out_stride_b + head * out_stride_h
    out += rows[:, None] * out_stride_s + dims[None, :]
    tl.store(out, result.to(out.dtype.element_ty), mask=(segment_rows < q_segment_tokens)[:, None])


def plan_merge(
    parts: Tensor, log_sums: Tensor, out: Tensor, first_tile: int, q_grid: BlockGrid
) -> Launch:
    """The launch of `reference.merge_parts`, for contiguous parts."""
    tiles, num_parts, q_block, head_dim = parts.shape
    arguments = {
        "parts": parts,
        "log_sums": log_sums,
        "out": out,
        **strides("out", out, "bsh"),
        "first_tile": first_tile,
        "num_parts": num_parts,
        "num_heads": out.shape[2],
        "num_rows": out.shape[1] // q_grid.segment_tokens * q_grid.blocks_per_segment,
        "q_segment_tokens": q_grid.segment_tokens,
        "q_blocks_per_segment": q_grid.blocks_per_segment,
        "HEAD_DIM": head_dim,
        "Q_BLOCK": q_block,
        "ROWS": min(_ROWS, q_block),
    }
    programs = tiles * (q_block // min(_ROWS, q_block))
    return Launch(merge_parts_kernel, (programs,), arguments, {"num_warps": 4})
