"""Blocks of keys to eight bits in Triton: one program does one block of one head.

Reference: `reference.quantise_blocks`; SageAttention (arXiv 2410.02367) for the shift.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .checks import check_quantisation
from .grid import BlockGrid
from .launch import Launch, check_tensors, strides

_RUNTIME = ["num_heads", "num_blocks", "blocks_per_slot", "tail_tokens"]
_RUNTIME += ["scales_stride_b", "scales_stride_h"]


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=["scales"])
def quantise_blocks_kernel(
    x,
    shift,  # [B, H, D]
    out,
    scales,  # [B, H, blocks]
    x_stride_b,
    x_stride_s,
    x_stride_h,
    out_stride_b,
    out_stride_s,
    out_stride_h,
    scales_stride_b,
    scales_stride_h,
    num_heads,
    num_blocks,
    blocks_per_slot,
    tail_tokens,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one head; consecutive programs read consecutive memory."""
    program = tl.program_id(0)
    head = (program % num_heads).to(tl.int64)
    block = (program // num_heads) % num_blocks
    batch = ((program // num_heads) // num_blocks).to(tl.int64)
    is_last = block % blocks_per_slot == blocks_per_slot - 1
    tokens = tl.where(is_last, tail_tokens, BLOCK)

    rows = tl.arange(0, BLOCK)[:, None]
    dims = tl.arange(0, HEAD_DIM)
    first_row = block.to(tl.int64) * BLOCK
    x += batch * x_stride_b + first_row * x_stride_s + head * x_stride_h
    b_x = tl.load(x + rows * x_stride_s + dims[None, :], mask=rows < tokens, other=0.0)
    b_shift = tl.load(shift + (batch * num_heads + head) * HEAD_DIM + dims)
    shifted = tl.where(rows < tokens, b_x.to(tl.float32) - b_shift[None, :], 0.0)
    most = tl.max(tl.max(tl.abs(shifted), 1), 0)
    inverse = 127.0 / tl.where(most > 0.0, most, 1.0)

    out += batch * out_stride_b + first_row * out_stride_s + head * out_stride_h
    levels = tl.floor(shifted * inverse + 0.5).to(tl.int8)
    tl.store(out + rows * out_stride_s + dims[None, :], levels, mask=rows < tokens)
    tl.store(scales + batch * scales_stride_b + head * scales_stride_h + block, most / 127.0)


def quantise_blocks_triton(
    x: Tensor, shift: Tensor, grid: BlockGrid, *, out: Tensor, scales: Tensor
) -> None:
    """`reference.quantise_blocks` in one launch; x bfloat16, float16 or float32, dense in D.

    Raises:
        ValueError: shapes, types or strides that the kernel cannot do, with what it can.
    """
    check_quantisation(x, shift, grid, out, scales)
    check_tensors({"x": x})
    for name, size in (("head dim", x.shape[3]), ("block", grid.block_tokens)):
        if size != triton.next_power_of_2(size):
            raise ValueError(f"the Triton kernel needs a power of two as {name}, got {size}")
    for name, dense in (("out", out), ("scales", scales)):
        if dense.stride(-1) != 1:
            raise ValueError(f"{name} must be dense in its last axis, got {dense.stride()}")
    if x.numel():
        plan_quantisation(x, shift, grid, out, scales).run()


def plan_quantisation(
    x: Tensor, shift: Tensor, grid: BlockGrid, out: Tensor, scales: Tensor
) -> Launch:
    """The launch for arguments that have been checked."""
    batch, heads, blocks = scales.shape
    arguments = {
        "x": x,
        "shift": shift.contiguous(),
        "out": out,
        "scales": scales,
        **strides("x", x, "bsh"),
        **strides("out", out, "bsh"),
        **strides("scales", scales, "bh"),
        "num_heads": heads,
        "num_blocks": blocks,
        "blocks_per_slot": grid.blocks_per_segment,
        "tail_tokens": grid.tail_tokens,
        "HEAD_DIM": x.shape[3],
        "BLOCK": grid.block_tokens,
    }
    # 32 floats of a block in a thread.
    num_warps = min(max(grid.block_tokens * x.shape[3] // 1024, 1), 8)
    return Launch(
        quantise_blocks_kernel, (batch * blocks * heads,), arguments, {"num_warps": num_warps}
    )
