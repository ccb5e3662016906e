"""Block means in Triton: one program averages the tokens of one block of one head.

Sums are float32. A short last block is divided by the tokens it has, and rows beyond them are
neither read nor counted, so padding may hold anything.

Reference: `reference.pool_blocks`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import segments_of
from .grid import BlockGrid
from .launch import Launch, check_tensors, strides

_RUNTIME = ["num_heads", "num_blocks", "blocks_per_segment", "segment_rows", "tail_tokens"]


@triton.jit(do_not_specialize=_RUNTIME)
def pool_blocks_kernel(
    x,
    out,
    x_stride_b,
    x_stride_s,
    x_stride_h,
    out_stride_b,
    out_stride_h,
    out_stride_n,
    num_heads,
    num_blocks,
    blocks_per_segment,
    segment_rows,
    tail_tokens,
    head_dim,
    block_tokens,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The mean of one block of one head; consecutive programs read consecutive memory."""
    program = tl.program_id(0)
    head = (program % num_heads).to(tl.int64)
    block = (program // num_heads) % num_blocks
    batch = (program // num_heads) // num_blocks
    segment = block // blocks_per_segment
    segment_block = block - segment * blocks_per_segment
    tokens = tl.where(segment_block == blocks_per_segment - 1, tail_tokens, block_tokens)

    first_row = segment * segment_rows + segment_block * block_tokens
    x += batch.to(tl.int64) * x_stride_b + first_row.to(tl.int64) * x_stride_s + head * x_stride_h
    rows = tl.arange(0, BLOCK_S)[:, None]
    dims = tl.arange(0, BLOCK_D)
    mask = (rows < tokens) & (dims < head_dim)[None, :]
    b_x = tl.load(x + rows * x_stride_s + dims[None, :], mask=mask, other=0.0)
    mean = tl.sum(b_x.to(tl.float32), 0) / tokens.to(tl.float32)

    out += batch.to(tl.int64) * out_stride_b + head * out_stride_h + block * out_stride_n
    tl.store(out + dims, mean, mask=dims < head_dim)


def pool_blocks_triton(x: Tensor, grid: BlockGrid, *, padded: bool) -> Tensor:
    """`reference.pool_blocks` in one launch; x bfloat16, float16 or float32, dense in D.

    Raises:
        ValueError: shapes, types or strides that the kernel cannot do, with what it can.
    """
    segments = segments_of(x, grid, padded=padded, name="x")
    check_tensors({"x": x})
    batch, _, heads, head_dim = x.shape
    blocks = segments * grid.blocks_per_segment
    out = torch.empty(batch, heads, blocks, head_dim, dtype=torch.float32, device=x.device)
    if out.numel():
        plan_pooling(x, out, grid, padded).run()
    return out


def plan_pooling(x: Tensor, out: Tensor, grid: BlockGrid, padded: bool) -> Launch:
    """The launch for arguments that have been checked; out [B, H, blocks, D]."""
    batch, heads, blocks, head_dim = out.shape
    arguments = {
        "x": x,
        "out": out,
        **strides("x", x, "bsh"),
        **strides("out", out, "bhn"),
        "num_heads": heads,
        "num_blocks": blocks,
        "blocks_per_segment": grid.blocks_per_segment,
        "segment_rows": grid.slot_tokens if padded else grid.segment_tokens,
        "tail_tokens": grid.tail_tokens,
        "head_dim": head_dim,
        "block_tokens": grid.block_tokens,
        "BLOCK_S": triton.next_power_of_2(grid.block_tokens),
        "BLOCK_D": triton.next_power_of_2(head_dim),
    }
    return Launch(pool_blocks_kernel, (batch * blocks * heads,), arguments, {"num_warps": 4})
