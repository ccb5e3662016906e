"""What the kernels must compute, in plain torch: any device, any float type, any block size.

Slow on purpose where that keeps it plain. All arithmetic is in float32 or wider and rounded once,
at the end, so a low-precision kernel is judged against the value and not against another rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import (
    ROLE_ABSENT,
    ROLE_CANDIDATE,
    ROLE_FORCED,
    check_attention,
    check_projection,
    check_quantisation,
    check_selection,
    segments_of,
)
from .eight_bit import Scaling
from .grid import BlockGrid

_GATHER_BYTES = 64 << 20
"""Keys gathered at once: enough to fill a matmul, little enough to stay near the caches."""


def pool_blocks(x: Tensor, grid: BlockGrid, *, padded: bool) -> Tensor:
    """Mean of each block of tokens.

    Args:
        x: [B, S, H, D], any strides, any float type.
        grid: how a segment is cut into blocks; a short last block is averaged over its own tokens.
        padded: False: S is segments of `segment_tokens` rows, densely. True: S is slots of
            `slot_tokens` rows; their padding rows may hold anything (NaN too) and do not count.

    Returns:
        float32 [B, H, segments * blocks_per_segment, D].

    Raises:
        ValueError: S is not a whole number of segments or slots.
    """
    segments = segments_of(x, grid, padded=padded, name="x")
    x = x.unflatten(1, (segments, -1))[:, :, : grid.segment_tokens].to(_wide(x))
    # Zeros fill the last block; its sum is then divided by the tokens it has.
    x = F.pad(x, (0, 0, 0, 0, 0, grid.slot_tokens - grid.segment_tokens))
    sums = x.unflatten(2, (grid.blocks_per_segment, grid.block_tokens)).sum(3)
    counts = torch.full((grid.blocks_per_segment, 1, 1), float(grid.block_tokens))
    counts[-1] = grid.tail_tokens
    means = sums / counts.to(x)  # [B, segments, blocks, H, D]
    return means.flatten(1, 2).transpose(1, 2).float()


def select_blocks(
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
    """Choose the key blocks of every query block, in two stages.

    The score of a key block is the dot product of the pooled vectors, without scale or softmax.
    Stage one: a candidate segment's score is the mean of its block scores (which is the dot
    product with the segment's mean vector); per query block the `keep_candidates` best candidate
    segments become eligible. Stage two: the `top_k` best blocks of all eligible segments.

    Ties go to the lower id, of segments and of blocks. Blocks of forced segments, and
    `own_blocks`, come before all others; if they alone exceed `top_k`, the lowest ids of them are
    taken. A NaN score counts as -inf, and so does the NaN mean of +inf and -inf: such blocks are
    eligible and come last. Blocks of absent segments, and of candidate segments that were not
    kept, are never selected (except an own block of the latter): the list gets shorter instead.

    Args:
        pooled_q: [B, H, NQ, D], float32.
        pooled_k: [B, H, NK, D], float32, any strides; NK = segments * blocks_per_segment.
        blocks_per_segment: key blocks of one segment.
        roles: role of each segment, int32 [segments] on the tensors' device, or a sequence:
            0 absent, 1 eligible, 2 candidate, 3 forced.
        keep_candidates: candidate segments to keep; as many as there are (or more) makes the
            rule one-stage, 0 or less keeps none.
        top_k: width of the list.
        own_blocks: int32 [NQ], a key block for each query block that is always selected; an id
            outside 0..NK-1 or in an absent segment means none.
        limits: int32 [2] on the tensors' device: keep_candidates and the number of blocks to keep
            (at most top_k), instead of the numbers given; for a captured graph, which would hold
            numbers fast.
        out: where to write the two results; default new.

    Returns:
        kv_indices int32 [B, H, NQ, top_k], ascending, -1 after the last one selected, and
        kv_counts int32 [B, H, NQ].

    Raises:
        ValueError: shapes that do not fit each other, or top_k below 1.

    Reference: Light Forcing (arXiv 2602.04789), section "Hierarchical Sparse Attention", and its
    released code; there masked blocks fill the list when fewer than top_k are eligible, and
    nothing is forced.
    """
    check_selection(pooled_q, pooled_k, blocks_per_segment, roles, top_k, own_blocks, limits, out)
    width = top_k
    if limits is not None:
        keep_candidates, top_k = limits.tolist()
        top_k = min(top_k, width)
    device, num_blocks = pooled_q.device, pooled_k.shape[2]
    roles = torch.as_tensor(roles, device=device)
    # In float64 and rounded, so that neither the summation order nor a host's TF32 switch decides.
    scores = (pooled_q.double() @ pooled_k.double().transpose(2, 3)).float()
    scores = _nan_last(scores)  # [B, H, NQ, NK]

    segment_scores = _nan_last(scores.unflatten(3, (-1, blocks_per_segment)).mean(4))
    is_candidate = (roles == ROLE_CANDIDATE).expand(segment_scores.shape)
    ranks = _rank(segment_scores, is_candidate.int())
    kept = torch.where(is_candidate, ranks < keep_candidates, roles != ROLE_ABSENT)

    tiers = kept.int() + (kept & (roles == ROLE_FORCED)).int()  # 0 never, 1 by score, 2 first
    tiers = tiers.repeat_interleave(blocks_per_segment, 3)
    if own_blocks is not None:
        is_own = torch.arange(num_blocks, device=device) == own_blocks[:, None]  # [NQ, NK]
        is_own &= (roles != ROLE_ABSENT).repeat_interleave(blocks_per_segment)
        tiers = tiers.masked_fill(is_own, 2)

    # Among those that come first, ids decide and not scores.
    ranks = _rank(scores.masked_fill(tiers == 2, 0.0), tiers)
    selected = (ranks < top_k) & (tiers > 0)
    counts = selected.sum(3, dtype=torch.int32)
    ids = torch.arange(num_blocks, device=device, dtype=torch.int32)
    ids = torch.where(selected, ids, num_blocks).sort(3).values[..., :width]
    ids = F.pad(ids, (0, width - ids.shape[3]), value=num_blocks)
    ids = ids.masked_fill(ids == num_blocks, -1).contiguous()
    return (ids, counts) if out is None else (out[0].copy_(ids), out[1].copy_(counts))


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_indices: Tensor,
    kv_counts: Tensor | None,
    *,
    q_grid: BlockGrid,
    kv_grid: BlockGrid,
    scale: float | None = None,
    out: Tensor | None = None,
    k_scales: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T) v of each query block over the key blocks in its list.

    Args:
        q: [B, Sq, H, D], Sq = query segments * q_grid.segment_tokens, densely. Query blocks start
            anew with each segment.
        k, v: [B, slots * kv_grid.slot_tokens, H, D], any strides. Block b is the rows from
            b * block_tokens on; in the last block of a slot only the first `tail_tokens` count,
            the rows after them may hold anything (NaN too).
        kv_indices: int32 [B, H, query blocks, width], the key blocks of each query block in any
            order. Each id at most once: a duplicate would count twice and is the caller's error
            (see `check_block_lists`).
        kv_counts: int32 [B, H, query blocks], how many ids of the row are meant; None: all.
        scale: of the scores; default 1 / sqrt(D).
        out: where to write, like q with any strides; default new.
        k_scales: float32 [B, H, key blocks]; then k is int8, from `quantise_blocks`, and each row
            of q is rounded to int8 too, its largest value to 127. Sums of products of integers
            are exact; softmax and the product with v are as ever.

    Returns:
        [B, Sq, H, D] in q's type; zeros where the count is 0.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    check_attention(q, k, v, kv_indices, kv_counts, q_grid, kv_grid, out, k_scales)
    batch, _, heads, head_dim = q.shape
    width, block = kv_indices.shape[3], kv_grid.block_tokens
    out = torch.empty_like(q) if out is None else out
    if not q.numel():
        return out
    wide = _wide(q)
    scale = head_dim**-0.5 if scale is None else scale

    rows = q.unflatten(1, (-1, q_grid.segment_tokens)).to(wide)
    if k_scales is not None:
        levels, row_scales = _levels(rows, (-1,))
        rows = levels * row_scales
    rows = F.pad(rows, (0, 0, 0, 0, 0, q_grid.slot_tokens - q_grid.segment_tokens))
    rows = rows.flatten(1, 2).unflatten(1, (-1, q_grid.block_tokens))
    rows = rows.permute(0, 3, 1, 2, 4) * scale  # [B, H, NQ, block, D]
    keys, values = (x.unflatten(1, (-1, block)).permute(0, 3, 1, 2, 4) for x in (k, v))

    valid_tokens = torch.full((keys.shape[2],), block, device=q.device)
    valid_tokens[kv_grid.blocks_per_segment - 1 :: kv_grid.blocks_per_segment] = kv_grid.tail_tokens
    if kv_counts is None:
        kv_counts = torch.full_like(kv_indices[..., 0], width)
    listed = torch.arange(width, device=q.device) < kv_counts[..., None]
    ids = torch.where(listed, kv_indices, 0).long()  # [B, H, NQ, width]
    tokens = torch.where(listed, valid_tokens[ids] if width else 0, 0)
    is_valid = torch.arange(block, device=q.device) < tokens[..., None]

    batch_ids = torch.arange(batch, device=q.device).view(-1, 1, 1, 1)
    head_ids = torch.arange(heads, device=q.device).view(-1, 1, 1)
    results = torch.zeros_like(rows)
    bytes_per_block = 2 * batch * heads * max(width, 1) * block * head_dim * wide.itemsize
    step = max(1, _GATHER_BYTES // bytes_per_block)
    for first in range(0, rows.shape[2] if width else 0, step):
        some = slice(first, first + step)
        where = batch_ids, head_ids, ids[:, :, some]
        mask = is_valid[:, :, some].flatten(3)  # [B, H, some, width * block]
        some_keys = keys[where].to(wide)
        if k_scales is not None:
            some_keys *= k_scales[where][..., None, None]
        some_keys = some_keys.flatten(3, 4)
        # Zero, not only masked: a padding row's NaN times a weight of 0 is NaN.
        some_values = values[where].to(wide).flatten(3, 4).masked_fill(~mask[..., None], 0)
        scores = rows[:, :, some] @ some_keys.transpose(3, 4)
        weights = scores.masked_fill(~mask[..., None, :], float("-inf")).softmax(4)
        weights = weights.masked_fill(~mask[..., None, :], 0)  # a row without keys is NaN
        results[:, :, some] = weights @ some_values

    results = results.permute(0, 2, 3, 1, 4).flatten(1, 2).unflatten(1, (-1, q_grid.slot_tokens))
    return out.copy_(results[:, :, : q_grid.segment_tokens].flatten(1, 2))


def project_blocks(
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
    """From projections to what attention takes; keys and values go to their slots.

    Args:
        x_q, x_k, x_v: [B, S, H * D], as the linear layers leave them.
        weight_q, weight_k: [H * D], gains of the root-mean-square norms over the full width.
        eps: of the norms.
        cos, sin: float32 [S, D / 2], rotary of each token; neighbouring pairs rotate.
        keys, values: [B, slots, rows of a slot, H, D], written in the open slots, padding not.
        pooled_keys: float32 [B, H, slots * blocks, D], written in the open slots' blocks; None:
            nothing is pooled.
        open_slots: int32 [S / kv_grid.segment_tokens], where each segment goes.
        q_grid: one segment of S tokens.
        scaling: the x are products, int32 too, that these belong to: rows [B * S, 1]; columns
            [1, 3 * H * D] and bias of queries, keys and values side by side.

    Returns:
        q [B, S, H, D] in the keys' type, normalised and rotated, and its block means, float32
        [B, H, blocks, D], or None where nothing is pooled.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    check_projection(x_q, x_k, x_v, keys, values, pooled_keys, open_slots, q_grid, kv_grid, scaling)
    heads, dtype = keys.shape[3], keys.dtype
    if scaling is not None:
        joined = scaling.of(torch.cat((x_q, x_k, x_v), 2).flatten(0, 1))
        x_q, x_k, x_v = joined.unflatten(0, x_q.shape[:2]).chunk(3, 2)

    def rotated(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.to(_wide(x))
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        normed = (wide * scale).to(dtype) * weight.to(dtype)
        even, odd = normed.to(wide.dtype).unflatten(-1, (heads, -1, 2)).unbind(-1)
        c, s = cos[:, None], sin[:, None]
        pairs = torch.stack((even * c - odd * s, even * s + odd * c), dim=-1)
        return pairs.flatten(-2).to(dtype)

    q, k = rotated(x_q, weight_q), rotated(x_k, weight_k)
    v = x_v.unflatten(-1, (heads, -1))
    tokens = kv_grid.segment_tokens
    for segment, slot in enumerate(open_slots.tolist()):
        own = slice(segment * tokens, (segment + 1) * tokens)
        keys[:, slot, :tokens] = k[:, own]
        values[:, slot, :tokens] = v[:, own]
    if pooled_keys is None:
        return q, None
    of_slots = pooled_keys.unflatten(2, (-1, kv_grid.blocks_per_segment))
    pooled = pool_blocks(k, kv_grid, padded=False).unflatten(2, (len(open_slots), -1))
    of_slots[:, :, open_slots.long()] = pooled
    return q, pool_blocks(q, q_grid, padded=False)


def merge_parts(
    parts: Tensor, log_sums: Tensor, out: Tensor, first_tile: int, q_grid: BlockGrid
) -> Tensor:
    """Join attention to parts of index lists into attention to the whole lists.

    Args:
        parts: float32 [tiles, parts, block_tokens, D], each the attention to its part of a list,
            zeros for an empty part.
        log_sums: float32 [tiles, parts, block_tokens], base-2 logarithm of each row's sum of
            exponentials; -inf for an empty part.
        out: [B, Sq, H, D], where to write the rows of these tiles; others stay.
        first_tile: the first tile's place among all query blocks [B, H, query blocks], in order.
        q_grid: of out.

    Returns:
        out.
    """
    weights = (log_sums * math.log(2)).softmax(1).nan_to_num(0.0)  # no keys at all: NaN
    merged = (weights[..., None] * parts).sum(1).to(out.dtype)
    num_rows = out.shape[1] // q_grid.segment_tokens * q_grid.blocks_per_segment
    for offset, rows in enumerate(merged):
        batch_head, q_block = divmod(first_tile + offset, num_rows)
        batch, head = divmod(batch_head, out.shape[2])
        segment, block = divmod(q_block, q_grid.blocks_per_segment)
        row = block * q_grid.block_tokens
        number = min(q_grid.block_tokens, q_grid.segment_tokens - row)
        row += segment * q_grid.segment_tokens
        out[batch, row : row + number, head] = rows[:number]
    return out


def quantise_blocks(
    x: Tensor, shift: Tensor, grid: BlockGrid, *, out: Tensor, scales: Tensor
) -> None:
    """Round the blocks of some slots to int8, less a shift.

    A shift that is the same for all keys of a head moves all scores of a query alike, which
    softmax does not see; one near their mean leaves smaller values, and so finer steps.

    Args:
        x: [B, slots * slot_tokens, H, D], any strides; padding rows may hold anything (NaN too).
        shift: float32 [B, H, D].
        out: int8 like x; gets round((x - shift) / scale) of each block. Padding rows stay.
        scales: float32 [B, H, blocks]; gets each block's largest |x - shift| / 127.

    Raises:
        ValueError: shapes or types that do not fit each other.

    Reference: SageAttention (arXiv 2410.02367), smoothing of keys.
    """
    check_quantisation(x, shift, grid, out, scales)
    tokens = grid.segment_tokens
    rows = x.unflatten(1, (-1, grid.slot_tokens))[:, :, :tokens].to(_wide(x))
    rows = F.pad(rows - shift[:, None, None], (0, 0, 0, 0, 0, grid.slot_tokens - tokens))
    rows = rows.unflatten(2, (grid.blocks_per_segment, grid.block_tokens))
    levels, steps = _levels(rows, (3, 5))  # [B, slots, blocks, block, H, D], [.., 1, H, 1]
    out.unflatten(1, (-1, grid.slot_tokens))[:, :, :tokens] = levels.flatten(2, 3)[:, :, :tokens]
    scales.copy_(steps[:, :, :, 0, :, 0].flatten(1, 2).transpose(1, 2))


def check_block_lists(kv_indices: Tensor, kv_counts: Tensor | None, *, num_kv_blocks: int) -> None:
    """Refuse lists that the attention functions would silently get wrong. Waits for the device.

    Args:
        kv_indices: int32 [B, H, query blocks, width].
        kv_counts: int32 [B, H, query blocks], or None when every id is meant.
        num_kv_blocks: key blocks there are.

    Raises:
        ValueError: another type, a count outside 0..width, or among the ids that are meant one
            outside 0..num_kv_blocks-1 or a duplicate; names the first row at fault.
    """
    for name, x in (("kv_indices", kv_indices), ("kv_counts", kv_counts)):
        if x is not None and x.dtype != torch.int32:
            raise ValueError(f"{name} must be int32, got {x.dtype}")
    width = kv_indices.shape[3]
    if kv_counts is None:
        kv_counts = torch.full(kv_indices.shape[:3], width, device=kv_indices.device)
    if kv_counts.shape != kv_indices.shape[:3]:
        raise ValueError(
            f"kv_counts must be {tuple(kv_indices.shape[:3])}, got {tuple(kv_counts.shape)}"
        )

    def refuse(at_fault: Tensor, what: str) -> None:
        if at_fault.any():
            b, h, row = at_fault.nonzero()[0].tolist()
            raise ValueError(
                f"{what} in the list of batch {b}, head {h}, query block {row}: "
                f"{int(kv_counts[b, h, row])} ids of {kv_indices[b, h, row].tolist()}"
            )

    refuse((kv_counts < 0) | (kv_counts > width), f"a count outside 0..{width}")
    listed = torch.arange(width, device=kv_indices.device) < kv_counts[..., None]
    outside = (kv_indices < 0) | (kv_indices >= num_kv_blocks)
    refuse((listed & outside).any(3), f"a block id outside 0..{num_kv_blocks - 1}")
    # Ids that are not meant become distinct negative ones, which equal nothing.
    unmeant = -1 - torch.arange(width, device=kv_indices.device)
    ids = torch.where(listed, kv_indices, unmeant).sort(3).values
    refuse((ids[..., 1:] == ids[..., :-1]).any(3), "a duplicate block id")


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _levels(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """x in steps of its largest absolute value over some axes / 127, and the steps."""
    most = x.abs().amax(axes, keepdim=True)
    inverse = 127 / torch.where(most > 0, most, 1)
    return (x * inverse + 0.5).floor(), most / 127


def _nan_last(scores: Tensor) -> Tensor:
    return scores.masked_fill(scores.isnan(), float("-inf"))


def _rank(scores: Tensor, tiers: Tensor) -> Tensor:
    """Place of each entry of the last axis: higher tier, then higher score, then lower index."""
    order = scores.argsort(dim=3, descending=True, stable=True)
    order = order.gather(3, tiers.gather(3, order).argsort(dim=3, descending=True, stable=True))
    places = torch.arange(scores.shape[3], device=scores.device).expand(scores.shape)
    return torch.empty_like(order).scatter_(3, order, places)
