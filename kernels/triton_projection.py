"""What lies between the projections and attention, in one launch: norm, rotary, cache, pooling.

Queries are normalised, rotated and pooled; keys are normalised, rotated, written to their slots
and pooled; values are written to their slots. Each number is read and written once: a program does
one block, some whole rows at a time, which stay in registers from the norm to the store.

Roundings are those of the modules it replaces: the norm in float32, rounded, times its weight,
rounded; the rotation in float32, rounded; means of the rounded values.

Reference: `reference.project_blocks`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_projection
from .grid import BlockGrid
from .launch import Launch, check_tensors

_RUNTIME = ["num_q_blocks", "num_k_blocks", "q_tokens", "kv_blocks_per_slot", "kv_tokens"]
_RUNTIME += ["slot_rows", "cache_stride_b", "pooled_q_blocks", "pooled_k_blocks"]
_NUMBERS_OF_A_THREAD = 48
_UNPOOLED_BLOCK = 64


@triton.jit
def _rotated(x, weight, scale, cos, sin, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rows of one head, normalised and rotated, in their own type."""
    gain = tl.load(weight + tl.arange(0, HEAD_DIM)[None, :]).to(x.dtype)
    normed = (x.to(tl.float32) * scale[:, None]).to(x.dtype) * gain
    even, odd = tl.split(normed.to(tl.float32).reshape(ROWS, HEAD_DIM // 2, 2))
    rotated = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return rotated.reshape(ROWS, HEAD_DIM).to(x.dtype)


@triton.jit
def _block(
    x, weight, cos, sin, out, pooled, count, x_stride, pooled_stride, eps,
    POOLS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Rows of one block; and the mean of its rows for each head."""
    width: tl.constexpr = HEADS * HEAD_DIM
    dims, half = tl.arange(0, HEAD_DIM)[None, :], tl.arange(0, HEAD_DIM // 2)[None, :]
    for first in range(0, BLOCK, ROWS):
        rows = first + tl.arange(0, ROWS)[:, None]
        valid = rows < count
        parts = ()
        squares = tl.zeros([ROWS, HEAD_DIM], tl.float32)
        for head in tl.static_range(HEADS):
            part = tl.load(x + rows * x_stride + head * HEAD_DIM + dims, mask=valid, other=0.0)
            squares += part.to(tl.float32) * part.to(tl.float32)
            parts = parts + (part,)  # noqa: RUF005  Triton knows no star
        scale = tl.rsqrt(tl.sum(squares, 1) / width + eps)
        c = tl.load(cos + rows * (HEAD_DIM // 2) + half, mask=valid, other=0.0)
        s = tl.load(sin + rows * (HEAD_DIM // 2) + half, mask=valid, other=0.0)
        for head in tl.static_range(HEADS):
            part = _rotated(parts[head], weight + head * HEAD_DIM, scale, c, s, ROWS, HEAD_DIM)
            tl.store(out + rows * width + head * HEAD_DIM + dims, part, mask=valid)
            if POOLS:
                mean = tl.sum(part.to(tl.float32), 0) / count.to(tl.float32)
                at = pooled + head * pooled_stride + tl.arange(0, HEAD_DIM)
                if first > 0:  # this program's own numbers: the order of the sum is fixed
                    mean += tl.load(at)
                tl.store(at, mean)
        if POOLS and BLOCK > ROWS:
            tl.debug_barrier()  # other threads may read them next time


@triton.jit(do_not_specialize=_RUNTIME)
def project_blocks_kernel(
    x_q,  # [B, S, H * D], rows x_stride apart
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
    pooled_q,  # [B, H, query blocks, D] float32, or None
    pooled_k,  # [B, H, all key blocks, D] float32, or None
    num_q_blocks,
    num_k_blocks,
    q_tokens,
    kv_blocks_per_slot,
    kv_tokens,
    slot_rows,
    x_stride,
    cache_stride_b,
    pooled_q_blocks,
    pooled_k_blocks,
    eps,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One block of queries, or of keys, or of values; the large ones first."""
    program = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    width: tl.constexpr = HEADS * HEAD_DIM
    x_start = batch * q_tokens * x_stride
    if program < num_q_blocks:
        token = program * Q_BLOCK
        count = tl.minimum(q_tokens - token, Q_BLOCK)
        angle = token * (HEAD_DIM // 2)
        pooled = pooled_q
        if pooled_q is not None:
            pooled = pooled_q + (batch * HEADS * pooled_q_blocks + program) * HEAD_DIM
        _block(
            x_q + x_start + token.to(tl.int64) * x_stride, weight_q, cos + angle, sin + angle,
            q + (batch * q_tokens + token) * width, pooled, count, x_stride,
            pooled_q_blocks * HEAD_DIM, eps, pooled_q is not None, Q_BLOCK, ROWS, HEADS, HEAD_DIM,
        )  # fmt: skip
    else:
        block = (program - num_q_blocks) % num_k_blocks
        segment = block // kv_blocks_per_slot
        slot_block = block - segment * kv_blocks_per_slot
        start = slot_block * KV_BLOCK
        count = tl.minimum(kv_tokens - start, KV_BLOCK)
        token = segment * kv_tokens + start
        slot = tl.load(open_slots + segment)
        to = batch * cache_stride_b + (slot.to(tl.int64) * slot_rows + start) * width
        x_at = x_start + token.to(tl.int64) * x_stride
        if program < num_q_blocks + num_k_blocks:
            angle = token * (HEAD_DIM // 2)
            pooled = pooled_k
            if pooled_k is not None:
                in_cache = slot * kv_blocks_per_slot + slot_block
                pooled = pooled_k + (batch * HEADS * pooled_k_blocks + in_cache) * HEAD_DIM
            _block(
                x_k + x_at, weight_k, cos + angle, sin + angle, keys + to, pooled, count,
                x_stride, pooled_k_blocks * HEAD_DIM, eps, pooled_k is not None,
                KV_BLOCK, ROWS, HEADS, HEAD_DIM,
            )  # fmt: skip
        else:
            dims = tl.arange(0, HEAD_DIM)[None, :]
            for first in range(0, KV_BLOCK, ROWS):
                rows = first + tl.arange(0, ROWS)[:, None]
                for head in tl.static_range(HEADS):
                    at = head * HEAD_DIM + dims
                    part = tl.load(x_v + x_at + rows * x_stride + at, mask=rows < count)
                    tl.store(values + to + rows * width + at, part, mask=rows < count)


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
    pooled_keys: Tensor | None,
    open_slots: Tensor,
    *,
    q_grid: BlockGrid,
    kv_grid: BlockGrid,
) -> tuple[Tensor, Tensor | None]:
    """`reference.project_blocks` in one launch; all contiguous but the x, whose rows may be apart.

    Raises:
        ValueError: shapes, types or strides that the kernel cannot do, with what it can.
    """
    check_projection(x_q, x_k, x_v, keys, values, pooled_keys, open_slots, q_grid, kv_grid)
    batch, tokens, _ = x_q.shape
    heads, head_dim = keys.shape[3:]
    every = {"x_q": x_q, "x_k": x_k, "x_v": x_v, "keys": keys, "values": values}
    check_tensors(every)
    for name in ("x_q", "x_k", "x_v"):
        x = every.pop(name)
        if x.stride() != x_q.stride() or (batch > 1 and x.stride(0) != tokens * x.stride(1)):
            raise ValueError(
                f"x_q, x_k and x_v must have the same strides and batches {tokens} rows apart, "
                f"got {name} with strides {x.stride()}"
            )
    every |= {"weight_q": weight_q, "weight_k": weight_k, "cos": cos, "sin": sin}
    for name, x in (every | {"pooled_keys": pooled_keys, "open_slots": open_slots}).items():
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {x.stride()}")
    q = torch.empty(batch, tokens, heads, head_dim, dtype=x_q.dtype, device=x_q.device)
    pooled_q = None
    if pooled_keys is not None:
        pooled_q = torch.empty(
            (batch, heads, q_grid.blocks_per_segment, head_dim),
            dtype=torch.float32,
            device=x_q.device,
        )
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
    pooled_keys: Tensor | None,
    open_slots: Tensor,
    q: Tensor,
    pooled_q: Tensor | None,
    q_grid: BlockGrid,
    kv_grid: BlockGrid,
    *,
    num_warps: int = 8,
    rows: int | None = None,
) -> Launch:
    """The launch for arguments that have been checked."""
    batch, tokens, heads, head_dim = q.shape
    slot_rows = kv_grid.slot_tokens
    if pooled_keys is None:  # blocks mean nothing then, but share the work
        q_grid, kv_grid = (BlockGrid(g.segment_tokens, _UNPOOLED_BLOCK) for g in (q_grid, kv_grid))
    if rows is None:
        rows = _NUMBERS_OF_A_THREAD * 32 * num_warps // (heads * head_dim)
        rows = 1 << max(rows, 1).bit_length() - 1  # a power of two
    num_q_blocks = q_grid.blocks_per_segment
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
        "num_q_blocks": num_q_blocks,
        "num_k_blocks": num_k_blocks,
        "q_tokens": tokens,
        "kv_blocks_per_slot": kv_grid.blocks_per_segment,
        "kv_tokens": kv_grid.segment_tokens,
        "slot_rows": slot_rows,
        "x_stride": x_q.stride(1),
        "cache_stride_b": 0 if batch == 1 else keys.stride(0),
        "pooled_q_blocks": num_q_blocks,
        "pooled_k_blocks": 0 if pooled_keys is None else pooled_keys.shape[2],
        "eps": eps,
        "HEAD_DIM": head_dim,
        "HEADS": heads,
        "Q_BLOCK": q_grid.block_tokens,
        "KV_BLOCK": kv_grid.block_tokens,
        "ROWS": min(rows, q_grid.block_tokens, kv_grid.block_tokens),
    }
    grid = (num_q_blocks + 2 * num_k_blocks, batch)
    return Launch(project_blocks_kernel, grid, arguments, {"num_warps": num_warps})
