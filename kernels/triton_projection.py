"""What lies between the projections and attention, in one launch: norm, rotary, cache, pooling.

Queries are normalised, rotated and pooled; keys are normalised, rotated, written to their slots
and pooled; values are written to their slots. Each number is read once more than it must be (the
norm spans all heads) and written once. One program does one block: first the sums of squares of
its rows over all heads, then head by head.

Roundings are those of the modules it replaces: the norm in float32, rounded, times its weight,
rounded; the rotation in float32, rounded; means of the rounded values.

Reference: `reference.project_blocks`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import PROJECTED_KV_TOKENS, check_projection
from .grid import BlockGrid
from .launch import Launch, check_tensors

_RUNTIME = ["num_q_blocks", "num_k_blocks", "q_tokens", "kv_blocks_per_slot", "kv_tokens"]
_RUNTIME += ["slot_rows", "num_heads", "cache_stride_b", "pooled_q_blocks", "pooled_k_blocks"]


@triton.jit
def _scales(x, valid, width, num_heads, eps, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Reciprocal root mean square of each row of x [ROWS, num_heads * HEAD_DIM]."""
    rows = tl.arange(0, ROWS)[:, None]
    dims = tl.arange(0, HEAD_DIM)[None, :]
    squares = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for head in range(num_heads):
        at = x + rows * width + head * HEAD_DIM + dims
        part = tl.load(at, mask=valid, other=0.0).to(tl.float32)
        squares += part * part
    return tl.rsqrt(tl.sum(squares, 1) / width + eps)


@triton.jit
def _rotated_head(
    x, weight, scale, cos, sin, valid, width, head, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Rows of one head, normalised and rotated, in the type of x."""
    rows = tl.arange(0, ROWS)[:, None]
    dims = tl.arange(0, HEAD_DIM)[None, :]
    part = tl.load(x + rows * width + head * HEAD_DIM + dims, mask=valid, other=0.0)
    gain = tl.load(weight + head * HEAD_DIM + dims).to(part.dtype)
    normed = (part.to(tl.float32) * scale[:, None]).to(part.dtype) * gain
    even, odd = tl.split(normed.to(tl.float32).reshape(ROWS, HEAD_DIM // 2, 2))
    rotated = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return rotated.reshape(ROWS, HEAD_DIM).to(part.dtype)


@triton.jit
def _angles(cos, sin, token, valid, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    half = tl.arange(0, HEAD_DIM // 2)[None, :]
    at = (token + tl.arange(0, ROWS)[:, None]) * (HEAD_DIM // 2) + half
    return tl.load(cos + at, mask=valid, other=0.0), tl.load(sin + at, mask=valid, other=0.0)


@triton.jit(do_not_specialize=_RUNTIME)
def project_blocks_kernel(
    x_q,  # [B, S, H * D]
    x_k,
    x_v,
    weight_q,  # [H * D]
    weight_k,
    cos,  # [S, D / 2] float32
    sin,
    open_slots,  # [segments] int32
    q,  # [B, S, H, D]
    keys,  # [B, slots, rows of a slot, H, D]
    values,
    pooled_q,  # [B, H, query blocks, D] float32
    pooled_k,  # [B, H, all key blocks, D] float32
    num_q_blocks,
    num_k_blocks,
    q_tokens,
    kv_blocks_per_slot,
    kv_tokens,
    slot_rows,
    num_heads,
    cache_stride_b,
    pooled_q_blocks,
    pooled_k_blocks,
    eps,
    HEAD_DIM: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
):
    """One block of queries, or of keys, or of values."""
    program = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    width = num_heads * HEAD_DIM
    dims = tl.arange(0, HEAD_DIM)
    batch_rows = batch * q_tokens * width
    if program < num_q_blocks:
        token = program * Q_BLOCK
        count = tl.minimum(q_tokens - token, Q_BLOCK)
        q_rows = tl.arange(0, Q_BLOCK)[:, None]
        q_valid = q_rows < count
        x = x_q + batch_rows + token.to(tl.int64) * width
        out = q + batch_rows + token.to(tl.int64) * width
        scale = _scales(x, q_valid, width, num_heads, eps, Q_BLOCK, HEAD_DIM)
        c, s = _angles(cos, sin, token, q_valid, Q_BLOCK, HEAD_DIM)
        pooled = pooled_q + (batch * num_heads * pooled_q_blocks + program) * HEAD_DIM + dims
        for head in range(num_heads):
            part = _rotated_head(x, weight_q, scale, c, s, q_valid, width, head, Q_BLOCK, HEAD_DIM)
            tl.store(out + q_rows * width + head * HEAD_DIM + dims[None, :], part, mask=q_valid)
            mean = tl.sum(part.to(tl.float32), 0) / count.to(tl.float32)
            tl.store(pooled + head * pooled_q_blocks * HEAD_DIM, mean)
    else:
        block = (program - num_q_blocks) % num_k_blocks
        segment = block // kv_blocks_per_slot
        slot_block = block - segment * kv_blocks_per_slot
        first = slot_block * KV_BLOCK
        count = tl.minimum(kv_tokens - first, KV_BLOCK)
        token = segment * kv_tokens + first
        slot = tl.load(open_slots + segment)
        rows = tl.arange(0, KV_BLOCK)[:, None]
        valid = rows < count
        at = batch_rows + token.to(tl.int64) * width
        to = batch * cache_stride_b + (slot.to(tl.int64) * slot_rows + first) * width
        if program < num_q_blocks + num_k_blocks:
            x = x_k + at
            scale = _scales(x, valid, width, num_heads, eps, KV_BLOCK, HEAD_DIM)
            c, s = _angles(cos, sin, token, valid, KV_BLOCK, HEAD_DIM)
            in_cache = slot * kv_blocks_per_slot + slot_block
            pooled = pooled_k + (batch * num_heads * pooled_k_blocks + in_cache) * HEAD_DIM + dims
            for head in range(num_heads):
                part = _rotated_head(
                    x, weight_k, scale, c, s, valid, width, head, KV_BLOCK, HEAD_DIM
                )
                tl.store(
                    keys + to + rows * width + head * HEAD_DIM + dims[None, :], part, mask=valid
                )
                mean = tl.sum(part.to(tl.float32), 0) / count.to(tl.float32)
                tl.store(pooled + head * pooled_k_blocks * HEAD_DIM, mean)
        else:
            for head in range(num_heads):
                offsets = rows * width + head * HEAD_DIM + dims[None, :]
                part = tl.load(x_v + at + offsets, mask=valid, other=0.0)
                tl.store(values + to + offsets, part, mask=valid)


def project_blocks_triton(
    x_q: Tensor,
    x_k: Tensor,
    x_v: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    pooled_keys: Tensor,
    open_slots: Tensor,
    *,
    q_grid: BlockGrid,
    kv_grid: BlockGrid,
) -> tuple[Tensor, Tensor]:
    """`reference.project_blocks` in one launch; all tensors contiguous.

    Raises:
        ValueError: shapes, types or strides that the kernel cannot do, with what it can.
    """
    check_projection(x_q, x_k, x_v, keys, values, pooled_keys, open_slots, q_grid, kv_grid)
    if kv_grid.block_tokens > PROJECTED_KV_TOKENS:
        raise ValueError(
            f"the projection kernel does key blocks of at most {PROJECTED_KV_TOKENS} tokens, "
            f"got {kv_grid.block_tokens}"
        )
    batch, tokens, _ = x_q.shape
    heads, head_dim = keys.shape[3:]
    every = {"x_q": x_q, "x_k": x_k, "x_v": x_v, "keys": keys, "values": values}
    check_tensors(every)
    every |= {"weight_q": weight_q, "weight_k": weight_k, "cos": cos, "sin": sin}
    for name, x in (every | {"pooled_keys": pooled_keys, "open_slots": open_slots}).items():
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {x.stride()}")
    q = torch.empty(batch, tokens, heads, head_dim, dtype=x_q.dtype, device=x_q.device)
    blocks = tokens // q_grid.segment_tokens * q_grid.blocks_per_segment
    pooled_q = torch.empty(batch, heads, blocks, head_dim, dtype=torch.float32, device=x_q.device)
    plan_projection(
        x_q, x_k, x_v, weight_q, weight_k, eps, cos, sin, keys, values, pooled_keys, open_slots,
        q, pooled_q, q_grid, kv_grid,
    ).run()  # fmt: skip
    return q, pooled_q


def plan_projection(
    x_q: Tensor,
    x_k: Tensor,
    x_v: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    pooled_keys: Tensor,
    open_slots: Tensor,
    q: Tensor,
    pooled_q: Tensor,
    q_grid: BlockGrid,
    kv_grid: BlockGrid,
) -> Launch:
    """The launch for arguments that have been checked."""
    batch, tokens, heads, head_dim = q.shape
    num_k_blocks = len(open_slots) * kv_grid.blocks_per_segment
    arguments = {
        "x_q": x_q,
        "x_k": x_k,
        "x_v": x_v,
        "weight_q": weight_q,
        "weight_k": weight_k,
        "cos": cos,
        "sin": sin,
        "open_slots": open_slots,
        "q": q,
        "keys": keys,
        "values": values,
        "pooled_q": pooled_q,
        "pooled_k": pooled_keys,
        "num_q_blocks": pooled_q.shape[2],
        "num_k_blocks": num_k_blocks,
        "q_tokens": tokens,
        "kv_blocks_per_slot": kv_grid.blocks_per_segment,
        "kv_tokens": kv_grid.segment_tokens,
        "slot_rows": kv_grid.slot_tokens,
        "num_heads": heads,
        "cache_stride_b": 0 if batch == 1 else keys.stride(0),
        "pooled_q_blocks": pooled_q.shape[2],
        "pooled_k_blocks": pooled_keys.shape[2],
        "eps": eps,
        "HEAD_DIM": head_dim,
        "Q_BLOCK": q_grid.block_tokens,
        "KV_BLOCK": kv_grid.block_tokens,
    }
    grid = (pooled_q.shape[2] + 2 * num_k_blocks, batch)
    # 32 numbers a thread.
    largest = max(q_grid.block_tokens, kv_grid.block_tokens) * head_dim
    warps = 16 if largest > 64 * 128 else 8
    return Launch(project_blocks_kernel, grid, arguments, {"num_warps": warps})
