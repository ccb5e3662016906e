"""Two-stage selection of key blocks in two launches: scores, then one program per query block.

The second kernel holds a whole row of scores as a tile [segments, blocks of a segment]. Scores
become int32 keys of the same order; the k-th largest key is found bit by bit from the top (32
counts, exact for any k), ties go to the lower index by a running count, and a cumulative sum
turns the chosen ids into an ascending list. The mean over a tile's row is the segment's score,
because a mean of dot products is the dot product with the mean.

Keys: 0 is never selected, 0xffffffff is selected first; every score lies between.

Reference: `reference.select_blocks`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_selection
from .configs import selection_warps
from .launch import Launch, check_tensors, strides

MAX_TILE = 16384
"""Scores of one row, padded to powers of two, that a program can hold in registers."""
MIN_SEGMENTS = 32
"""Smallest tile height: caches up to this many segments share one compiled kernel."""
SCORE_TILE_Q = 16
SCORE_TILE_K = 64
SCORE_STEP_D = 16


@triton.jit(do_not_specialize=["num_q", "num_k", "num_heads"])
def block_scores_kernel(
    pooled_q,
    pooled_k,
    scores,  # [B, H, NQ, NK]
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    num_heads,
    num_q,
    num_k,
    head_dim,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEP_D: tl.constexpr,
):
    """float32 dot products of BLOCK_Q x BLOCK_K pairs of one head, on plain multiply-adds."""
    batch_head = tl.program_id(2)
    head = batch_head % num_heads
    batch = batch_head // num_heads
    q_ids = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    k_ids = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    dims = tl.arange(0, STEP_D)
    pooled_q += batch.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
    pooled_k += batch.to(tl.int64) * k_stride_b + head.to(tl.int64) * k_stride_h
    q_rows = pooled_q + q_ids[:, None] * q_stride_n
    k_rows = pooled_k + k_ids[None, :] * k_stride_n
    result = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for first in range(0, head_dim, STEP_D):
        at = first + dims
        q_mask = (q_ids < num_q)[:, None] & (at < head_dim)[None, :]
        k_mask = (k_ids < num_k)[None, :] & (at < head_dim)[:, None]
        b_q = tl.load(q_rows + at[None, :], mask=q_mask, other=0.0)
        b_k = tl.load(k_rows + at[:, None], mask=k_mask, other=0.0)
        result = tl.dot(b_q, b_k, result, input_precision="tf32x3")
    scores += (batch_head.to(tl.int64) * num_q + q_ids[:, None]) * num_k + k_ids[None, :]
    tl.store(scores, result, mask=(q_ids < num_q)[:, None] & (k_ids < num_k)[None, :])


@triton.jit
def _nan_last(scores):
    return tl.where(scores == scores, scores, float("-inf"))


@triton.jit
def _ordered_keys(scores):
    """uint32 keys in the order of float32 scores without NaN; -0 equals +0."""
    bits = scores.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -2147483648, 0, bits)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def _take_best(keys, k):
    """The k largest nonzero keys of a 1-D tensor, ties to the lower index.

    Returns their mask, the place of each among them in ascending order of index, and their count.
    """
    threshold = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        enough = tl.sum((keys >= (threshold | bit)).to(tl.int32), 0) >= k
        threshold = tl.where(enough, threshold | bit, threshold)
        bit = bit >> 1
    above = keys > threshold
    equal = (keys == threshold) & (keys != 0)
    # Both running counts in one sum; a row has fewer than 2^15 keys.
    counts = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)
    num_above = tl.sum(above.to(tl.int32), 0)
    room = tl.maximum(k - num_above, 0)
    taken = above | (equal & ((counts >> 16) <= room))
    places = (counts & 0xFFFF) + tl.minimum(counts >> 16, room) - 1
    count = num_above + tl.minimum(tl.sum(equal.to(tl.int32), 0), room)
    return taken, places, count


@triton.jit(
    do_not_specialize=[
        "num_q", "num_segments", "blocks_per_segment", "keep_candidates", "top_k"
    ],
    do_not_specialize_on_alignment=[
        "scores", "roles", "own_blocks", "limits", "kv_indices", "kv_counts"
    ],
)  # fmt: skip
def select_blocks_kernel(
    scores,  # [B, H, NQ, NK]
    roles,  # [segments]
    own_blocks,  # [NQ]
    limits,  # [2], instead of keep_candidates and of the budget
    kv_indices,  # [B, H, NQ, top_k]
    kv_counts,  # [B, H, NQ]
    num_q,
    num_segments,
    blocks_per_segment,
    keep_candidates,
    top_k,
    HAS_OWN: tl.constexpr,
    HAS_LIMITS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The list of one query block."""
    row = tl.program_id(0)
    budget = top_k
    if HAS_LIMITS:
        keep_candidates = tl.load(limits)
        budget = tl.minimum(tl.load(limits + 1), top_k)
    segment_ids = tl.arange(0, SEGMENTS)
    blocks = tl.arange(0, BLOCKS)
    in_segment = (blocks < blocks_per_segment)[None, :]
    exists = (segment_ids < num_segments)[:, None] & in_segment
    ids = segment_ids[:, None] * blocks_per_segment + blocks[None, :]
    row_scores = scores + row.to(tl.int64) * num_segments * blocks_per_segment
    b_scores = _nan_last(tl.load(row_scores + ids, mask=exists, other=0.0))
    b_roles = tl.load(roles + segment_ids, mask=segment_ids < num_segments, other=0)

    segment_scores = _nan_last(tl.sum(b_scores, 1) / blocks_per_segment)
    is_candidate = b_roles == 2
    candidate_keys = tl.where(is_candidate, _ordered_keys(segment_scores), 0)
    best, _, _ = _take_best(candidate_keys, keep_candidates)
    kept = (b_roles == 1) | (b_roles == 3) | best

    keys = tl.where(exists & kept[:, None], _ordered_keys(b_scores), 0)
    keys = tl.where(exists & (b_roles == 3)[:, None], 0xFFFFFFFF, keys)
    keys = tl.reshape(keys, [SEGMENTS * BLOCKS])
    entries = tl.arange(0, SEGMENTS * BLOCKS)
    if HAS_OWN:
        own = tl.load(own_blocks + row % num_q)
        is_block = (own >= 0) & (own < num_segments * blocks_per_segment)
        own_segment = own // blocks_per_segment
        own_role = tl.load(roles + own_segment, mask=is_block, other=0)
        own_entry = own_segment * BLOCKS + own % blocks_per_segment
        keys = tl.where((entries == own_entry) & (own_role != 0), 0xFFFFFFFF, keys)
    taken, places, count = _take_best(keys, budget)
    kv_indices += row.to(tl.int64) * top_k
    # Made anew: ids kept through the search would cost registers.
    ids = (entries // BLOCKS) * blocks_per_segment + entries % BLOCKS
    tl.store(kv_indices + places, ids, mask=taken)
    tl.store(kv_counts + row, count)
    for start in range(count, top_k, BLOCKS):
        tl.store(kv_indices + start + blocks, -1, mask=start + blocks < top_k)


def select_blocks_triton(
    pooled_q: Tensor,
    pooled_k: Tensor,
    *,
    blocks_per_segment: int,
    roles: Tensor | Sequence[int],
    keep_candidates: int,
    top_k: int,
    own_blocks: Tensor | None = None,
    limits: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.select_blocks` in two launches; see there for the rule.

    Scores are sums of float32 products, so blocks whose scores differ by less than rounding may
    be ordered otherwise than by the reference. Roles as a tensor on the device avoid a copy that
    a CUDA graph could not hold.

    Raises:
        ValueError: shapes, types or strides that the kernels cannot do, with what they can.
    """
    check_selection(pooled_q, pooled_k, blocks_per_segment, roles, top_k, own_blocks, limits, out)
    check_tensors({"pooled_q": pooled_q, "pooled_k": pooled_k})
    if pooled_q.dtype != torch.float32:
        raise ValueError(f"pooled_q and pooled_k must be float32, got {pooled_q.dtype}")
    device = pooled_q.device
    roles = torch.as_tensor(roles, dtype=torch.int32, device=device)
    for name, x in (("roles", roles), ("own_blocks", own_blocks), ("limits", limits)):
        if x is not None and (x.dtype != torch.int32 or x.device != device):
            raise ValueError(f"{name} must be int32 on {device}, got {x.dtype} on {x.device}")
    batch, heads, num_q, _ = pooled_q.shape
    num_k = pooled_k.shape[2]
    segments = num_k // blocks_per_segment
    tile_segments, tile_blocks = _tile(segments, blocks_per_segment)
    if tile_segments * tile_blocks > MAX_TILE:
        raise ValueError(
            f"{segments} segments of {blocks_per_segment} blocks need a tile of "
            f"{tile_segments} x {tile_blocks} scores, more than the {MAX_TILE} of the kernel; "
            "use larger blocks or the torch reference"
        )
    rows = batch, heads, num_q
    if out is None:
        kv_indices = torch.empty(*rows, top_k, dtype=torch.int32, device=device)
        kv_counts = torch.empty(rows, dtype=torch.int32, device=device)
    else:
        kv_indices, kv_counts = out
    if not kv_counts.numel():
        return kv_indices, kv_counts
    scores = torch.empty(*rows, num_k, dtype=torch.float32, device=device)
    if num_k:
        plan_scores(pooled_q, pooled_k, scores).run()
    plan_selection(
        scores,
        roles,
        kv_indices,
        kv_counts,
        blocks_per_segment,
        keep_candidates,
        own_blocks,
        limits,
    ).run()
    return kv_indices, kv_counts


def plan_scores(pooled_q: Tensor, pooled_k: Tensor, scores: Tensor) -> Launch:
    """The first launch, for arguments that have been checked."""
    batch, heads, num_q, num_k = scores.shape
    tiles = triton.cdiv(num_k, SCORE_TILE_K), triton.cdiv(num_q, SCORE_TILE_Q), batch * heads
    arguments = {
        "pooled_q": pooled_q,
        "pooled_k": pooled_k,
        "scores": scores,
        **strides("q", pooled_q, "bhn"),
        **strides("k", pooled_k, "bhn"),
        "num_heads": heads,
        "num_q": num_q,
        "num_k": num_k,
        "head_dim": pooled_q.shape[3],
        "BLOCK_Q": SCORE_TILE_Q,
        "BLOCK_K": SCORE_TILE_K,
        "STEP_D": SCORE_STEP_D,
    }
    return Launch(block_scores_kernel, tiles, arguments, {"num_warps": 4})


def plan_selection(
    scores: Tensor,
    roles: Tensor,
    kv_indices: Tensor,
    kv_counts: Tensor,
    blocks_per_segment: int,
    keep_candidates: int,
    own_blocks: Tensor | None,
    limits: Tensor | None = None,
) -> Launch:
    """The second launch, for arguments that have been checked."""
    tile_segments, tile_blocks = _tile(len(roles), blocks_per_segment)
    arguments = {
        "scores": scores,
        "roles": roles.contiguous(),
        "own_blocks": roles if own_blocks is None else own_blocks.contiguous(),
        "limits": roles if limits is None else limits,
        "kv_indices": kv_indices,
        "kv_counts": kv_counts,
        "num_q": scores.shape[2],
        "num_segments": len(roles),
        "blocks_per_segment": blocks_per_segment,
        "keep_candidates": keep_candidates,
        "top_k": kv_indices.shape[3],
        "HAS_OWN": own_blocks is not None,
        "HAS_LIMITS": limits is not None,
        "SEGMENTS": tile_segments,
        "BLOCKS": tile_blocks,
    }
    options = {"num_warps": selection_warps(tile_segments * tile_blocks)}
    return Launch(select_blocks_kernel, (kv_counts.numel(),), arguments, options)


def _tile(segments: int, blocks_per_segment: int) -> tuple[int, int]:
    """Tile of the selection kernel, [segments, blocks of a segment] in powers of two."""
    width = triton.next_power_of_2(blocks_per_segment)
    smallest = max(1, min(MIN_SEGMENTS, MAX_TILE // width))
    return max(smallest, triton.next_power_of_2(segments)), width
