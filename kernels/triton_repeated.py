"""Attention to keys of which the last ones are all alike: only those that differ are read.

Reference: `reference_repeated`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_repeated
from .launch import Launch, check_tensors, strides

HEAD_DIMS = (64, 128)
_BLOCK_M, _BLOCK_N = 64, 32
"""Small, since prompts are short: several programs share a multiprocessor and wait for each other
less."""


@triton.jit(do_not_specialize=["q_rows", "k_rows"])
def attend_repeated_kernel(
    q,  # [B, Sq, H, D], any strides but a dense last axis; so are k, v and out
    k,  # [B, Sk, H, D]
    v,
    distinct,  # [1] int32
    out,
    q_rows,
    k_rows,
    scale,  # of scores in base 2
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    out_stride_b,
    out_stride_s,
    out_stride_h,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Some queries of one head."""
    batch, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_DIM)[None, :]
    wide_rows = rows.to(tl.int64)[:, None]
    exists = rows[:, None] < q_rows
    queries = tl.load(
        q + batch * q_stride_b + head * q_stride_h + wide_rows * q_stride_s + dims,
        mask=exists,
        other=0.0,
    )
    k += batch * k_stride_b + head * k_stride_h
    v += batch * v_stride_b + head * v_stride_h
    number = tl.load(distinct)
    # The last row stands for all that are like it.
    more = tl.log2((k_rows - number + 1).to(tl.float32))
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for first in range(0, number, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        is_key = columns < number
        keys = tl.load(k + columns[:, None] * k_stride_s + dims, mask=is_key[:, None], other=0.0)
        values = tl.load(v + columns[:, None] * v_stride_s + dims, mask=is_key[:, None], other=0.0)
        scores = tl.dot(queries, keys.T) * scale
        scores += tl.where(columns == number - 1, more, 0.0)[None, :]
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(values.dtype), values, sums * shrink[:, None])
        highest = higher
    at = batch * out_stride_b + head * out_stride_h + wide_rows * out_stride_s + dims
    tl.store(out + at, (sums / total[:, None]).to(queries.dtype), mask=exists)


def attend_repeated_triton(q: Tensor, k: Tensor, v: Tensor, distinct: Tensor) -> Tensor:
    """`reference_repeated.attend_repeated` in one launch.

    Raises:
        ValueError: shapes, types or strides that the kernel cannot do, with what it can.
    """
    check_repeated(q, k, v, distinct)
    check_tensors({"q": q, "k": k, "v": v}, HEAD_DIMS)
    if distinct.device != q.device:
        raise ValueError(f"distinct must be on {q.device}, got {distinct.device}")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.numel():
        plan_repeated(q, k, v, distinct, out).run()
    return out


def plan_repeated(q: Tensor, k: Tensor, v: Tensor, distinct: Tensor, out: Tensor) -> Launch:
    """The launch for arguments that have been checked."""
    batch, q_rows, heads, head_dim = q.shape
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "distinct": distinct,
        "out": out,
        "q_rows": q_rows,
        "k_rows": k.shape[1],
        "scale": math.log2(math.e) / math.sqrt(head_dim),
        **strides("q", q, "bsh"),
        **strides("k", k, "bsh"),
        **strides("v", v, "bsh"),
        **strides("out", out, "bsh"),
        "HEAD_DIM": head_dim,
        "BLOCK_M": _BLOCK_M,
        "BLOCK_N": _BLOCK_N,
    }
    grid = (triton.cdiv(q_rows, _BLOCK_M), heads, batch)
    return Launch(attend_repeated_kernel, grid, arguments, {"num_warps": 4, "num_stages": 2})
