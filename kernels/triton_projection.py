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
from .eight_bit import Scaling
from .grid import BlockGrid
from .launch import Launch, check_tensors
from .triton_rows import check_product, row_pieces, row_warps, scaled, scaling_arguments

_RUNTIME = ["num_q_blocks", "num_k_blocks", "q_tokens", "kv_blocks_per_slot", "kv_tokens"]
_RUNTIME += ["slot_rows", "num_heads", "pooled_q_blocks", "pooled_k_blocks"]
# Not the strides: that they divide by 16 is what makes loads and stores wide.
_ROWS = 64  # at a time, so that three programs share a multiprocessor
_UNPOOLED_BLOCK = 64


@triton.jit
def row_scales_kernel(
    x_q,  # [N, C], rows x_stride apart
    x_k,
    row_scales,  # [N], with column_scales; None: x are no products
    column_scales,  # [3 * C] or None, of queries, keys and values
    bias,  # [3 * C] or None
    scales,  # [2, N] float32
    x_stride,
    eps,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    """Reciprocal root mean square of one row of queries or of keys."""
    row = tl.program_id(0)
    is_key = tl.program_id(1)
    x = x_q if is_key == 0 else x_k
    x += row.to(tl.int64) * x_stride
    factor = row_scales
    if row_scales is not None:
        factor = tl.load(row_scales + row)
        column_scales += is_key * COLUMNS
        if bias is not None:
            bias += is_key * COLUMNS
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at).to(tl.float32)
    value = scaled(value, factor, column_scales, bias, at, at < BLOCK)
    square = tl.sum(value * value, 0)
    if REST > 0:
        at = BLOCK + tl.arange(0, REST)
        value = tl.load(x + at, mask=at < COLUMNS, other=0.0).to(tl.float32)
        value = scaled(value, factor, column_scales, bias, at, at < COLUMNS)
        square += tl.sum(value * value, 0)
    tl.store(scales + is_key * tl.num_programs(0) + row, tl.rsqrt(square / COLUMNS + eps))


@triton.jit
def _pairs(x, at, mask):
    """Even and odd numbers of rows, as float32: read as one word, so that neighbours, which the
    rotation mixes, are in one thread and no number has to change place.

    at counts pairs.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    if dtype.primitive_bitwidth == 16:
        word = tl.load(x.to(tl.pointer_type(tl.int32)) + at, mask=mask, other=0)
        even = word.to(tl.int16).to(dtype, bitcast=True)
        odd = (word >> 16).to(tl.int16).to(dtype, bitcast=True)
    else:
        word = tl.load(x.to(tl.pointer_type(tl.int64)) + at, mask=mask, other=0)
        even = word.to(tl.int32).to(dtype, bitcast=True)
        odd = (word >> 32).to(tl.int32).to(dtype, bitcast=True)
    return even.to(tl.float32), odd.to(tl.float32)


@triton.jit
def _store_pairs(out, at, even, odd, mask):
    """The other way round; even and odd of the type of out."""
    if out.dtype.element_ty.primitive_bitwidth == 16:
        low = even.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        word = (odd.to(tl.int16, bitcast=True).to(tl.int32) << 16) | low
        tl.store(out.to(tl.pointer_type(tl.int32)) + at, word, mask=mask)
    else:
        low = even.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        word = (odd.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low
        tl.store(out.to(tl.pointer_type(tl.int64)) + at, word, mask=mask)


@triton.jit
def _head_of_block(
    x, weight, row_scales, column_scales, bias, scales, cos, sin, out, pooled, count, x_stride,
    width,
    POOLS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One head of the rows of a block, normalised and rotated, and the mean of the rows."""
    half = tl.arange(0, HEAD_DIM // 2)
    at = half[None, :]
    every = at >= 0
    dtype: tl.constexpr = out.dtype.element_ty
    even_gain, odd_gain = _pairs(weight, at, every)
    even_gain, odd_gain = even_gain.to(dtype), odd_gain.to(dtype)
    even_total = tl.zeros([HEAD_DIM // 2], tl.float32)
    odd_total = tl.zeros([HEAD_DIM // 2], tl.float32)
    for part in tl.static_range(BLOCK // ROWS):
        row = part * ROWS + tl.arange(0, ROWS)
        rows = row[:, None]
        valid = rows < count
        even, odd = _pairs(x + rows * x_stride, at, valid)
        if row_scales is not None:
            factor = tl.load(row_scales + row, mask=row < count, other=0.0)[:, None]
            even_columns, odd_columns = _pairs(column_scales, at, every)
            even *= factor * even_columns
            odd *= factor * odd_columns
            if bias is not None:
                even_bias, odd_bias = _pairs(bias, at, every)
                even += even_bias
                odd += odd_bias
        scale = tl.load(scales + row, mask=row < count, other=0.0)[:, None]
        even = ((even * scale).to(dtype) * even_gain).to(tl.float32)
        odd = ((odd * scale).to(dtype) * odd_gain).to(tl.float32)
        angle = rows * (HEAD_DIM // 2) + at
        c = tl.load(cos + angle, mask=valid, other=0.0)
        s = tl.load(sin + angle, mask=valid, other=0.0)
        turned_even = (even * c - odd * s).to(dtype)
        turned_odd = (even * s + odd * c).to(dtype)
        _store_pairs(out + rows * width, at, turned_even, turned_odd, valid)
        if POOLS:
            even_total += tl.sum(tl.where(valid, turned_even.to(tl.float32), 0.0), 0)
            odd_total += tl.sum(tl.where(valid, turned_odd.to(tl.float32), 0.0), 0)
    if POOLS:
        tl.store(pooled + 2 * half, even_total / count.to(tl.float32))
        tl.store(pooled + 2 * half + 1, odd_total / count.to(tl.float32))


@triton.jit(do_not_specialize=_RUNTIME)
def project_blocks_kernel(
    x_q,  # [B, S, H * D], rows x_stride apart
    x_k,
    x_v,
    weight_q,  # [H * D]
    weight_k,
    row_scales,  # [B * S], with column_scales; None: x are no products
    column_scales,  # [3 * H * D] or None, of queries, keys and values
    bias,  # [3 * H * D] or None
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
    if row_scales is not None:
        row_scales += first
        part = (program >= num_q_blocks).to(tl.int32)
        part += (program >= num_q_blocks + num_k_blocks).to(tl.int32)
        column_scales += part * width + at_head
        if bias is not None:
            bias += part * width + at_head
    if program < num_q_blocks:
        token = program * Q_BLOCK
        if row_scales is not None:
            row_scales += token
        count = tl.minimum(q_tokens - token, Q_BLOCK)
        angle = token * (HEAD_DIM // 2)
        pooled = pooled_q
        if pooled_q is not None:
            row = (batch * num_heads + head) * pooled_q_blocks + program
            pooled = pooled_q + row * HEAD_DIM
        _head_of_block(
            x_q + (first + token) * x_stride + at_head, weight_q + at_head, row_scales,
            column_scales, bias, scales + first + token, cos + angle, sin + angle,
            q + (first + token) * width + at_head, pooled, count, x_stride, width,
            pooled_q is not None, Q_BLOCK, Q_ROWS, HEAD_DIM,
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
        if row_scales is not None:
            row_scales += token
        if program < num_q_blocks + num_k_blocks:
            angle = token * (HEAD_DIM // 2)
            pooled = pooled_k
            if pooled_k is not None:
                row = (batch * num_heads + head) * pooled_k_blocks
                pooled = pooled_k + (row + slot * kv_blocks_per_slot + slot_block) * HEAD_DIM
            _head_of_block(
                x_k + x_at, weight_k + at_head, row_scales, column_scales, bias,
                scales + (tl.num_programs(2) + batch) * q_tokens + token, cos + angle, sin + angle,
                keys + to, pooled, count, x_stride, width, pooled_k is not None, KV_BLOCK, KV_ROWS,
                HEAD_DIM,
            )  # fmt: skip
        else:
            dims, places = tl.arange(0, HEAD_DIM), tl.arange(0, KV_BLOCK)
            rows = places[:, None]
            value = tl.load(x_v + x_at + rows * x_stride + dims[None, :], mask=rows < count)
            if row_scales is not None:
                factor = tl.load(row_scales + places, mask=places < count, other=0.0)[:, None]
                value = value.to(tl.float32) * (factor * tl.load(column_scales + dims)[None, :])
                if bias is not None:
                    value += tl.load(bias + dims)[None, :].to(tl.float32)
            value = value.to(values.dtype.element_ty)
            tl.store(values + to + rows * width + dims[None, :], value, mask=rows < count)


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
    scaling: Scaling | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`reference.project_blocks` in two launches; all contiguous, but rows of the x may be apart.

    Raises:
        ValueError: shapes, types or strides that the kernel cannot do, with what it can.
    """
    check_projection(x_q, x_k, x_v, keys, values, pooled_keys, open_slots, q_grid, kv_grid, scaling)
    batch, tokens, _ = x_q.shape
    heads, head_dim = keys.shape[3:]
    every = {"keys": keys, "values": values}
    check_tensors(every if scaling else {"x_q": x_q, "x_k": x_k, "x_v": x_v, **every})
    for name, x in {"x_q": x_q, "x_k": x_k, "x_v": x_v}.items():
        check_product(name, x, scaling)
        if x.device != keys.device:
            raise ValueError(f"{name} must be on {keys.device} as the keys, got {x.device}")
        if x.stride() != x_q.stride() or (batch > 1 and x.stride(0) != tokens * x.stride(1)):
            raise ValueError(
                f"x_q, x_k and x_v must have the same strides and batches {tokens} rows apart, "
                f"got {name} with strides {x.stride()}"
            )
    every |= {"weight_q": weight_q, "weight_k": weight_k, "cos": cos, "sin": sin}
    for name, x in (every | {"pooled_keys": pooled_keys, "open_slots": open_slots}).items():
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {x.stride()}")
    _check_pairs({"x_q": x_q, "x_k": x_k, **every}, scaling)
    q = torch.empty(batch, tokens, heads, head_dim, dtype=keys.dtype, device=x_q.device)
    pooled_q = None
    if pooled_keys is not None:
        pooled_q = torch.empty(
            (batch, heads, q_grid.blocks_per_segment, head_dim),
            dtype=torch.float32,
            device=x_q.device,
        )
    scales = torch.empty(2, batch * tokens, dtype=torch.float32, device=x_q.device)
    plan_row_scales(x_q, x_k, scales, eps, scaling).run()
    plan_projection(
        x_q, x_k, x_v, weight_q, weight_k, scales, cos, sin, keys, values, pooled_keys, open_slots,
        q, pooled_q, q_grid, kv_grid, scaling,
    ).run()  # fmt: skip
    return q, pooled_q


def _check_pairs(tensors: dict[str, Tensor], scaling: Scaling | None) -> None:
    """Two neighbours are read as one word, which must not straddle."""
    more = {name: x for name, x in scaling_arguments(scaling).items() if x is not None}
    for name, x in (tensors | more).items():
        if x.data_ptr() % (2 * x.element_size()):
            raise ValueError(
                f"{name} must begin at a multiple of two numbers, got storage offset "
                f"{x.storage_offset()}; pass a copy"
            )
        if x.ndim == 3 and x.stride(1) % 2:
            raise ValueError(
                f"rows of {name} must be an even number of numbers apart, got {x.stride(1)}"
            )


def plan_row_scales(
    x_q: Tensor, x_k: Tensor, scales: Tensor, eps: float, scaling: Scaling | None = None
) -> Launch:
    """The launch for arguments that have been checked."""
    width = x_q.shape[2]
    arguments = {
        "x_q": x_q,
        "x_k": x_k,
        **scaling_arguments(scaling),
        "scales": scales,
        "x_stride": x_q.stride(1),
        "eps": eps,
        **row_pieces(width),
    }
    return Launch(row_scales_kernel, (scales.shape[1], 2), arguments, row_warps(width, 64))


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
    scaling: Scaling | None = None,
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
        **scaling_arguments(scaling),
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
    return Launch(project_blocks_kernel, grid, arguments, {"num_warps": 4})
