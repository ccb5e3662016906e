"""Compiling a run's kernels before its first chunk, not in the middle of its video.

The kernels are launched once on the run's own cache, so types, strides and alignment are those of
every later launch, with queries of one frame and empty lists, so there is next to nothing to
compute. What Triton compiles for depends on nothing else that changes in a run, but for the
selection kernel's tile, which doubles as the history grows.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..kernels.grid import BlockGrid
from .backends import AttentionBackend
from .kv_cache import KVCache


def launch_all(
    backend: AttentionBackend,
    cache: KVCache,
    query_block_tokens: int,
    own_block_variants: Collection[bool] | None,
) -> None:
    """Launch all that a run over a cache may need.

    Args:
        backend: one that compiles (`attend_variants`).
        cache: of the run; it is read and not written.
        own_block_variants: whether selections will name own blocks; empty: lists will need no
            scores; None: no chunk will be sparse.
    """
    spec = cache.spec
    # Every commit pools keys, after dense chunks too.
    keys, values = (x[0][:, :1].flatten(1, 2) for x in (cache.keys, cache.values))
    backend.pool_blocks(keys, spec.grid, padded=True)
    if own_block_variants is not None:
        _sparse_chunks(backend, cache, keys, values, query_block_tokens, own_block_variants)


def _sparse_chunks(
    backend: AttentionBackend,
    cache: KVCache,
    keys: Tensor,
    values: Tensor,
    query_block_tokens: int,
    own_block_variants: Collection[bool],
) -> None:
    """Selection and attention, for queries of one frame; keys and values of one slot."""
    spec = cache.spec
    q = torch.zeros(
        (spec.batch, spec.frame_tokens, spec.num_heads, spec.head_dim),
        dtype=spec.dtype,
        device=keys.device,
    )
    q_grid = BlockGrid(spec.frame_tokens, query_block_tokens)
    pooled_q = backend.pool_blocks(q, q_grid, padded=False)

    own = torch.zeros(q_grid.blocks_per_segment, dtype=torch.int32, device=q.device)
    for has_own in own_block_variants:
        for frames in _halvings(spec.capacity_frames):
            backend.select_blocks(
                pooled_q,
                cache.pooled_keys[0][:, :, : frames * spec.blocks_per_frame],
                blocks_per_segment=spec.blocks_per_frame,
                roles=torch.ones(frames, dtype=torch.int32, device=q.device),
                keep_candidates=0,
                top_k=1,
                own_blocks=own if has_own else None,
            )

    rows = spec.batch, spec.num_heads, q_grid.blocks_per_segment
    counts = torch.zeros(rows, dtype=torch.int32, device=q.device)
    precision: dict[str, Tensor] = {}
    if spec.int8_keys:
        shift = torch.zeros_like(keys[:, 0], dtype=torch.float32)
        levels = torch.empty_like(keys, dtype=torch.int8)
        scales = torch.empty_like(cache.key_scales[0][:, :, : spec.blocks_per_frame])
        backend.quantise_blocks(keys, shift, spec.grid, out=levels, scales=scales)
        keys = cache.int8_keys[0][:, :1].flatten(1, 2)
        precision["k_scales"] = cache.key_scales[0][:, :, : spec.blocks_per_frame]
    for attend in backend.attend_variants:
        attend(
            q,
            keys,
            values,
            counts[..., None],
            counts,
            q_grid=q_grid,
            kv_grid=spec.grid,
            **precision,
        )


def _halvings(frames: int) -> list[int]:
    """A count and its halves, rounded up, down to 1: one for each power of two below it."""
    counts = [frames]
    while counts[-1] > 1:
        counts.append((counts[-1] + 1) // 2)
    return counts
