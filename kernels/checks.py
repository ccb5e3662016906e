"""What both implementations demand of their arguments, in the same words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .eight_bit import LARGEST, Scaling
from .grid import BlockGrid

ROLE_ABSENT = 0
"""The segment holds nothing; none of its blocks is ever selected."""
ROLE_ELIGIBLE = 1
"""Its blocks compete for the budget."""
ROLE_CANDIDATE = 2
"""Its blocks compete if the segment is among the best `keep_candidates` of its kind."""
ROLE_FORCED = 3
"""Its blocks are selected before all others."""


def segments_of(x: Tensor, grid: BlockGrid, *, padded: bool, name: str) -> int:
    """Number of segments in x [B, S, H, D].

    Raises:
        ValueError: x has another rank, or S is not a whole number of segments (or slots).
    """
    unit = grid.slot_tokens if padded else grid.segment_tokens
    if x.ndim != 4 or x.shape[1] % unit:
        kind = "slots" if padded else "segments"
        raise ValueError(
            f"{name} must be [B, S, H, D] with S a whole number of {kind} of {unit} rows, "
            f"got shape {tuple(x.shape)}"
        )
    return x.shape[1] // unit


def check_selection(
    pooled_q: Tensor,
    pooled_k: Tensor,
    blocks_per_segment: int,
    roles: Tensor | Sequence[int],
    top_k: int,
    own_blocks: Tensor | None,
    limits: Tensor | None,
    out: tuple[Tensor, Tensor] | None,
) -> None:
    """Shapes of `select_blocks`' arguments; reads no device memory.

    Raises:
        ValueError: with the argument, what was expected and what was given.
    """
    shapes = f"got {tuple(pooled_q.shape)} and {tuple(pooled_k.shape)}"
    if pooled_q.ndim != 4 or pooled_k.ndim != 4:
        raise ValueError(f"pooled_q and pooled_k must be [B, H, blocks, D], {shapes}")
    if pooled_q.shape[:2] != pooled_k.shape[:2] or pooled_q.shape[3] != pooled_k.shape[3]:
        raise ValueError(f"pooled_q and pooled_k must agree in B, H and D, {shapes}")
    blocks = pooled_k.shape[2]
    if blocks_per_segment < 1 or blocks % blocks_per_segment:
        raise ValueError(
            f"pooled_k has {blocks} blocks, not a whole number of segments of {blocks_per_segment}"
        )
    if len(roles) != blocks // blocks_per_segment:
        raise ValueError(
            f"roles must name one role for each of the {blocks // blocks_per_segment} segments, "
            f"got {len(roles)}"
        )
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1 block, got {top_k}")
    if own_blocks is not None and own_blocks.shape != pooled_q.shape[2:3]:
        raise ValueError(f"own_blocks must be [{pooled_q.shape[2]}], got {tuple(own_blocks.shape)}")
    if limits is not None and limits.shape != (2,):
        raise ValueError(f"limits must be [2], got {tuple(limits.shape)}")
    rows = pooled_q.shape[:3]
    for x, shape in zip(out or (), ((*rows, top_k), tuple(rows)), strict=False):
        if tuple(x.shape) != shape or x.dtype != torch.int32 or not x.is_contiguous():
            raise ValueError(
                f"out must hold contiguous int32 tensors {(*rows, top_k)} and {tuple(rows)}, "
                f"got {x.dtype} {tuple(x.shape)}"
            )


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_indices: Tensor,
    kv_counts: Tensor | None,
    q_grid: BlockGrid,
    kv_grid: BlockGrid,
    out: Tensor | None,
    k_scales: Tensor | None = None,
) -> None:
    """Shapes of `block_sparse_attention`'s arguments; reads no device memory.

    Raises:
        ValueError: with the argument, what was expected and what was given.
    """
    q_blocks = segments_of(q, q_grid, padded=False, name="q") * q_grid.blocks_per_segment
    segments_of(k, kv_grid, padded=True, name="k")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    batch, _, heads, head_dim = q.shape
    if (batch, heads, head_dim) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"q and k must agree in B, H and D, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    rows = (batch, heads, q_blocks)
    if kv_indices.ndim != 4 or tuple(kv_indices.shape[:3]) != rows:
        raise ValueError(
            f"kv_indices must be [B, H, query blocks, width] = {(*rows, 'width')}, "
            f"got {tuple(kv_indices.shape)}"
        )
    if kv_counts is not None and tuple(kv_counts.shape) != rows:
        raise ValueError(
            f"kv_counts must be [B, H, query blocks] = {rows}, got {tuple(kv_counts.shape)}"
        )
    if out is not None and (out.shape != q.shape or out.dtype != q.dtype):
        raise ValueError(
            f"out must be like q, {tuple(q.shape)} {q.dtype}, got {tuple(out.shape)} {out.dtype}"
        )
    if (k.dtype == torch.int8) != (k_scales is not None):
        raise ValueError(f"k_scales belong to keys of int8 and to no others, got {k.dtype}")
    if k_scales is not None:
        _check_scales("k_scales", k_scales, k, kv_grid)


def check_quantisation(
    x: Tensor, shift: Tensor, grid: BlockGrid, out: Tensor, scales: Tensor
) -> None:
    """Shapes and types of `quantise_blocks`' arguments; reads no device memory.

    Raises:
        ValueError: with the argument, what was expected and what was given.
    """
    segments_of(x, grid, padded=True, name="x")
    batch, _, heads, head_dim = x.shape
    if shift.shape != (batch, heads, head_dim) or shift.dtype != torch.float32:
        raise ValueError(
            f"shift must be float32 {(batch, heads, head_dim)}, "
            f"got {shift.dtype} {tuple(shift.shape)}"
        )
    if out.shape != x.shape or out.dtype != torch.int8:
        raise ValueError(f"out must be int8 {tuple(x.shape)}, got {out.dtype} {tuple(out.shape)}")
    _check_scales("scales", scales, x, grid)


def _check_scales(name: str, scales: Tensor, keys: Tensor, grid: BlockGrid) -> None:
    expected = keys.shape[0], keys.shape[2], keys.shape[1] // grid.block_tokens
    if tuple(scales.shape) != expected or scales.dtype != torch.float32:
        raise ValueError(
            f"{name} must be float32 [B, H, blocks] = {expected}, "
            f"got {scales.dtype} {tuple(scales.shape)}"
        )


def check_projection(
    x_q: Tensor,
    x_k: Tensor,
    x_v: Tensor,
    keys: Tensor,
    values: Tensor,
    pooled_keys: Tensor | None,
    open_slots: Tensor,
    q_grid: BlockGrid,
    kv_grid: BlockGrid,
    scaling: Scaling | None,
) -> None:
    """Shapes of `project_blocks`' arguments; reads no device memory.

    Raises:
        ValueError: with the argument, what was expected and what was given.
    """
    if x_q.ndim != 3 or not x_q.shape == x_k.shape == x_v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (x_q, x_k, x_v))
        raise ValueError(f"x_q, x_k and x_v must be [B, S, H * D] and alike, got {shapes}")
    if keys.ndim != 5 or keys.shape != values.shape or keys.shape[2] != kv_grid.slot_tokens:
        raise ValueError(
            f"keys and values must be [B, slots, {kv_grid.slot_tokens}, H, D] and alike, "
            f"got {tuple(keys.shape)} and {tuple(values.shape)}"
        )
    batch, slots, _, heads, head_dim = keys.shape
    if x_q.shape[0] != batch or x_q.shape[2] != heads * head_dim:
        raise ValueError(
            f"x_q must have {batch} batches and a width of {heads} x {head_dim} as the keys, "
            f"got {tuple(x_q.shape)}"
        )
    blocks = batch, heads, slots * kv_grid.blocks_per_segment, head_dim
    if pooled_keys is not None and pooled_keys.shape != blocks:
        raise ValueError(f"pooled_keys must be {list(blocks)}, got {tuple(pooled_keys.shape)}")
    if q_grid.segment_tokens != x_q.shape[1]:
        raise ValueError(
            f"the queries must be one segment, got {x_q.shape[1]} tokens and segments of "
            f"{q_grid.segment_tokens}"
        )
    if len(open_slots) * kv_grid.segment_tokens != x_q.shape[1]:
        raise ValueError(
            f"{len(open_slots)} open slots of {kv_grid.segment_tokens} tokens do not take "
            f"{x_q.shape[1]} tokens"
        )
    if scaling is not None:
        _check_scaling(x_q.shape[0] * x_q.shape[1], 3 * x_q.shape[2], *scaling)


def check_scaling(x: Tensor, scaling: Scaling | None) -> None:
    """Shapes and types of rows [N, C] and of what belongs to them as a product.

    Raises:
        ValueError: with the argument, what was expected and what was given.
    """
    if x.ndim != 2:
        raise ValueError(f"x must be [N, C], got {tuple(x.shape)}")
    if scaling is not None:
        _check_scaling(*x.shape, *scaling)


def check_rms_norm(x: Tensor, gain: Tensor, scaling: Scaling | None) -> None:
    """Shapes and types of `rms_norm`'s arguments; reads no device memory.

    Raises:
        ValueError: with the argument, what was expected and what was given.
    """
    check_scaling(x, scaling)
    if gain.shape != x.shape[1:]:
        raise ValueError(f"gain must be {list(x.shape[1:])}, got {list(gain.shape)}")


def _check_scaling(
    rows: int, columns: int, row_scales: Tensor, column_scales: Tensor, bias: Tensor | None
) -> None:
    for name, x, shape in (
        ("row_scales", row_scales, (rows, 1)),
        ("column_scales", column_scales, (1, columns)),
    ):
        if x.dtype != torch.float32 or x.shape != shape:
            raise ValueError(f"{name} must be float32 {shape}, got {x.dtype} {tuple(x.shape)}")
    if bias is not None and bias.shape != (columns,):
        raise ValueError(f"bias must be ({columns},), got {tuple(bias.shape)}")


def check_rows(
    hidden: Tensor,
    branch: Tensor | None,
    by_segment: dict[str, Tensor | None],
    branch_scales: Tensor | None,
) -> None:
    """Shapes of `add_norm`'s arguments; reads no device memory.

    Raises:
        ValueError: with the argument, what was expected and what was given.
    """
    if hidden.ndim != 2:
        raise ValueError(f"hidden must be [N, C], got {tuple(hidden.shape)}")
    if branch is not None and branch.shape != hidden.shape:
        raise ValueError(
            f"branch must be like hidden, {tuple(hidden.shape)}, got {tuple(branch.shape)}"
        )
    rows, columns = hidden.shape
    if branch_scales is not None and (
        branch is None or branch_scales.shape != (rows, 1) or branch_scales.dtype != torch.float32
    ):
        raise ValueError(
            f"branch_scales must be float32 {(rows, 1)} and belong to a branch, "
            f"got {branch_scales.dtype} {tuple(branch_scales.shape)}"
        )
    given = {name: x for name, x in by_segment.items() if x is not None}
    segments = max((len(x) for x in given.values()), default=1)
    for name, x in given.items():
        if x.ndim != 2 or x.shape[1] != columns or len(x) not in (1, segments):
            raise ValueError(f"{name} must be [1 or {segments}, {columns}], got {tuple(x.shape)}")
    if segments == 0 or rows % segments:
        raise ValueError(f"{rows} rows are no {segments} segments of equal length")


def check_eight_bit(to: torch.dtype) -> None:
    """Whether rows are rounded to a type.

    Raises:
        ValueError: they are not; with those they are.
    """
    if to not in LARGEST:
        raise ValueError(f"rows are rounded to {', '.join(map(str, LARGEST))}, not to {to}")


def check_sums(
    sums: Tensor, row_scales: Tensor, column_scales: Tensor, bias: Tensor | None
) -> None:
    """Shapes and types of `scale_sums`' arguments; reads no device memory.

    Raises:
        ValueError: with the argument, what was expected and what was given.
    """
    if sums.ndim != 2 or sums.dtype != torch.int32:
        raise ValueError(f"sums must be int32 [N, C], got {sums.dtype} {tuple(sums.shape)}")
    _check_scaling(*sums.shape, row_scales, column_scales, bias)


def check_repeated(q: Tensor, k: Tensor, v: Tensor, distinct: Tensor) -> None:
    """Shapes and types of `attend_repeated`'s arguments; reads no device memory.

    Raises:
        ValueError: with the argument, what was expected and what was given.
    """
    if q.ndim != 4 or k.ndim != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"q and k must be [B, S, H, D] and agree in B, H and D, got {tuple(q.shape)} and "
            f"{tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if distinct.shape != (1,) or distinct.dtype != torch.int32:
        raise ValueError(f"distinct must be int32 [1], got {distinct.dtype} {list(distinct.shape)}")
