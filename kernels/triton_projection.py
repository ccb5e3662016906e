"""What lies between the projections and attention: norm, rotary, cache write, pooling.

Queries are normalised, rotated and pooled; keys are normalised, rotated, written to their slots
and pooled; values are written to their slots. Two launches: the norm spans all heads, so a first
one finds the scale of each row, and in the second each program does one head of one block. With
one launch a program must hold or read again whole rows of its block, and few programs wait long.

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
from .triton_rows import row_pieces, row_warps

_RUNTIME = ["num_q_blocks", "num_k_blocks", "q_tokens", "kv_blocks_per_slot", "kv_tokens"]
_RUNTIME += ["slot_rows", "num_heads", "cache_stride_b", "pooled_q_blocks", "pooled_k_blocks"]
_ROWS = 64  # at a time, so that three programs share a multiprocessor
_UNPOOLED_BLOCK = 64


@triton.jit(do_not_specialize=["width"])
def row_scales_kernel(
    x_q,  # [N, width], rows x_stride apart
    x_k,
    scales,  # [2, N] float32
    width,
    x_stride,
    eps,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    """Reciprocal root mean square of one row of queries or of keys."""
    row = tl.program_id(0)
    is_key = tl.program_id(1)
    x = x_q if is_key == 0 else x_k
    x += row.to(tl.int64) * x_stride
    value = tl.load(x + tl.arange(0, BLOCK)).to(tl.float32)
    square = tl.sum(value * value, 0)
    if REST > 0:
        at = BLOCK + tl.arange(0, REST)
        value = tl.load(x + at, mask=at < width, other=0.0).to(tl.float32)
        square += tl.sum(value * value, 0)
    tl.store(scales + is_key * tl.num_programs(0) + row, tl.rsqrt(square / width + eps))


@triton.jit
def _head_of_block(
    x, weight, scales, cos, sin, out, pooled, count, x_stride, width,
    POOLS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One head of the rows of a block, normalised and rotated, and the mean of the rows."""
    dims, half = tl.arange(0, HEAD_DIM), tl.arange(0, HEAD_DIM // 2)[None, :]
    gain = tl.load(weight + dims)[None, :].to(x.dtype.element_ty)
    total = tl.zeros([HEAD_DIM], tl.float32)
    for part in tl.static_range(BLOCK // ROWS):
        row = part * ROWS + tl.arange(0, ROWS)
        rows = row[:, None]
        valid = rows < count
        scale = tl.load(scales + row, mask=row < count, other=0.0)[:, None]
        angle = rows * (HEAD_DIM // 2) + half
        c = tl.load(cos + angle, mask=valid, other=0.0)
        s = tl.load(sin + angle, mask=valid, other=0.0)
        value = tl.load(x + rows * x_stride + dims[None, :], mask=valid, other=0.0)
        normed = (value.to(tl.float32) * scale).to(value.dtype) * gain
        even, odd = tl.split(normed.to(tl.float32).reshape(ROWS, HEAD_DIM // 2, 2))
        rotated = tl.join(even * c - odd * s, even * s + odd * c)
        value = rotated.reshape(ROWS, HEAD_DIM).to(value.dtype)
        tl.store(out + rows * width + dims[None, :], value, mask=valid)
        if POOLS:
            total += tl.sum(value.to(tl.float32), 0)
    if POOLS:
        tl.store(pooled + dims, total / count.to(tl.float32))


@triton.jit(do_not_specialize=_RUNTIME)
def project_blocks_kernel(
    x_q,  # [B, S, H * D], rows x_stride apart
    x_k,
    x_v,
    weight_q,  # [H * D]
    weight_k,
    scales,  # [2, B * S] float32, of queries and of keys
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
    num_heads,
    x_stride,
    cache_stride_b,
    pooled_q_blocks,
    pooled_k_blocks,
    HEAD_DIM: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    Q_ROWS: tl.constexpr,
    KV_ROWS: tl.constexpr,
):
    """One head of one block of queries, or of keys, or of values."""
    program = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    width = num_heads * HEAD_DIM
    at_head = head * HEAD_DIM
    first = batch * q_tokens
    if program < num_q_blocks:
        token = program * Q_BLOCK
        count = tl.minimum(q_tokens - token, Q_BLOCK)
        angle = token * (HEAD_DIM // 2)
        pooled = pooled_q
        if pooled_q is not None:
            row = (batch * num_heads + head) * pooled_q_blocks + program
            pooled = pooled_q + row * HEAD_DIM
        _head_of_block(
            x_q + (first + token) * x_stride + at_head, weight_q + at_head, scales + first + token,
            cos + angle, sin + angle, q + (first + token) * width + at_head, pooled, count,
            x_stride, width, pooled_q is not None, Q_BLOCK, Q_ROWS, HEAD_DIM,
        )  # fmt: skip
    else:
        block = (program - num_q_blocks) % num_k_blocks
        segment = block // kv_blocks_per_slot
        slot_block = block - segment * kv_blocks_per_slot
        start = slot_block * KV_BLOCK
        count = tl.minimum(kv_tokens - start, KV_BLOCK)
        token = segment * kv_tokens + start
        slot = tl.load(open_slots + segment)
        to = batch * cache_stride_b + (slot.to(tl.int64) * slot_rows + start) * width + at_head
        x_at = (first + token) * x_stride + at_head
        if program < num_q_blocks + num_k_blocks:
            angle = token * (HEAD_DIM // 2)
            pooled = pooled_k
            if pooled_k is not None:
                row = (batch * num_heads + head) * pooled_k_blocks
                pooled = pooled_k + (row + slot * kv_blocks_per_slot + slot_block) * HEAD_DIM
            _head_of_block(
                x_k + x_at, weight_k + at_head, scales + (tl.num_programs(2) + batch) * q_tokens
                + token, cos + angle, sin + angle, keys + to, pooled, count, x_stride, width,
                pooled_k is not None, KV_BLOCK, KV_ROWS, HEAD_DIM,
            )  # fmt: skip
        else:
            dims = tl.arange(0, HEAD_DIM)[None, :]
            rows = tl.arange(0, KV_BLOCK)[:, None]
            part = tl.load(x_v + x_at + rows * x_stride + dims, mask=rows < count)
            tl.store(values + to + rows * width + dims, part, mask=rows < count)


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
    """`reference.project_blocks` in two launches; all contiguous, but rows of the x may be apart.

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
    scales = torch.empty(2, batch * tokens, dtype=torch.float32, device=x_q.device)
    plan_row_scales(x_q, x_k, scales, eps).run()
    plan_projection(
        x_q, x_k, x_v, weight_q, weight_k, scales, cos, sin, keys, values, pooled_keys, open_slots,
        q, pooled_q, q_grid, kv_grid,
    ).run()  # fmt: skip
    return q, pooled_q


def plan_row_scales(x_q: Tensor, x_k: Tensor, scales: Tensor, eps: float) -> Launch:
    """The launch for arguments that have been checked."""
    width = x_q.shape[2]
    arguments = {
        "x_q": x_q,
        "x_k": x_k,
        "scales": scales,
        "width": width,
        "x_stride": x_q.stride(1),
        "eps": eps,
        **row_pieces(width),
    }
    return Launch(row_scales_kernel, (scales.shape[1], 2), arguments, row_warps(width, 16))


def plan_projection(
    x_q: Tensor,
    x_k: Tensor,
    x_v: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    scales: Tensor,
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
) -> Launch:
    """The launch for arguments that have been checked."""
    batch, tokens, heads, head_dim = q.shape
    slot_rows = kv_grid.slot_tokens
    if pooled_keys is None:  # blocks mean nothing then, but share the work
        q_grid, kv_grid = (BlockGrid(g.segment_tokens, _UNPOOLED_BLOCK) for g in (q_grid, kv_grid))
    num_q_blocks = q_grid.blocks_per_segment
    num_k_blocks = len(open_slots) * kv_grid.blocks_per_segment
    arguments = {
        "x_q": x_q,
        "x_k": x_k,
        "x_v": x_v,
        "weight_q": weight_q,
        "weight_k": weight_k,
        "scales": scales,
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
        "num_heads": heads,
        "x_stride": x_q.stride(1),
        "cache_stride_b": 0 if batch == 1 else keys.stride(0),
        "pooled_q_blocks": num_q_blocks,
        "pooled_k_blocks": 0 if pooled_keys is None else pooled_keys.shape[2],
        "HEAD_DIM": head_dim,
        "Q_BLOCK": q_grid.block_tokens,
        "KV_BLOCK": kv_grid.block_tokens,
        "Q_ROWS": min(_ROWS, q_grid.block_tokens),
        "KV_ROWS": min(_ROWS, kv_grid.block_tokens),
    }
    grid = (num_q_blocks + 2 * num_k_blocks, heads, batch)
    return Launch(project_blocks_kernel, grid, arguments, {"num_warps": 8})
