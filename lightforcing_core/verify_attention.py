"""Golden cases of the released selection rule and its block-sparse attention, recomputed.

Runs the parts a rollout runs (schedule, policy, torch references) on one chunk at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.grid import BlockGrid
from .errors import UserError
from .layout import chunk_lengths
from .schedule import ChunkAwareGrowth, Timeline, chunk_sparsity, kept_blocks
from .selection import Hierarchical, KeyView

_SCHEDULE_TOLERANCE = 1e-9


@dataclass(frozen=True)
class AttentionCase:
    """One chunk, recomputed.

    Attributes:
        kv_indices: int16 [1, heads, query blocks, top_k], ascending.
        out: [1, Lq, heads, head_dim], from those lists.
        problems: what the metadata says otherwise, in words.
    """

    name: str
    kv_indices: Tensor
    out: Tensor
    problems: tuple[str, ...]


@torch.no_grad()
def attention_cases(
    tensors: Mapping[str, Tensor], golden: Mapping[str, Any]
) -> Iterator[AttentionCase]:
    """Recompute every case of a golden file, in its order.

    Args:
        tensors: `c<i>.q`, `c<i>.k`, `c<i>.v`, keys of past frames first.
        golden: the metadata, see the golden files' README.

    Raises:
        KeyError, ValueError, TypeError: metadata or tensors are missing or do not fit together.
        UserError: settings out of range.
    """
    schedule = ChunkAwareGrowth(golden["s_target"], golden["s_base"])
    policy = Hierarchical(golden["keep_frames"], golden["keep_sink"], golden["keep_near"])
    grid = BlockGrid(golden["frame_tokens"], golden["block"])
    lengths = chunk_lengths(golden["total_frames"], golden["frames_per_chunk"])
    timeline = Timeline(tuple(lengths), window_frames=golden.get("window", -1))
    sparsities = [chunk_sparsity(schedule, timeline, i) for i in range(timeline.num_chunks)]
    wrong_list = _list_problem(golden.get("sparsities"), sparsities)
    for case in golden["cases"]:
        chunk = case["chunk"]
        if not 0 <= chunk < timeline.num_chunks:
            raise UserError(f"there is no chunk {chunk} in {timeline.num_chunks} chunks")
        name = f"c{chunk}"
        q, k, v = (tensors[f"{name}.{part}"].float() for part in "qkv")
        expected_shape = (golden["heads"], golden["head_dim"])
        if tuple(q.shape[2:]) != expected_shape or tuple(k.shape[2:]) != expected_shape:
            raise ValueError(f"{name}: heads and head dim must be {expected_shape}")
        frames, own = (x.shape[1] // grid.segment_tokens for x in (k, q))
        view = KeyView(
            tuple(range(frames)), tuple(range(frames - own, frames)), grid.blocks_per_segment
        )
        rule = policy.rule(view, sparsities[chunk])
        indices, counts = reference.select_blocks(
            reference.pool_blocks(q, grid, padded=False),
            reference.pool_blocks(k, grid, padded=False),
            blocks_per_segment=grid.blocks_per_segment,
            roles=rule.roles,
            keep_candidates=rule.keep_candidates,
            top_k=rule.top_k,
        )
        out = reference.block_sparse_attention(
            q, _slots(k, grid), _slots(v, grid), indices, counts, q_grid=grid, kv_grid=grid
        )
        computed = {
            "past_frames": timeline.visible_frames(chunk) - timeline.frames(chunk),
            "kv_blocks": view.num_blocks,
            "topk": kept_blocks(sparsities[chunk], view.num_blocks),
        }
        problems = [
            f"{key} is {case[key]!r}, computed {value}"
            for key, value in computed.items()
            if key in case and case[key] != value
        ]
        if computed["past_frames"] != frames - own or own != timeline.frames(chunk):
            problems.append(
                f"keys of {frames} frames and queries of {own}, expected "
                f"{timeline.visible_frames(chunk)} and {timeline.frames(chunk)}"
            )
        if "sparsity" in case and not _close(case["sparsity"], sparsities[chunk]):
            problems.append(f"sparsity is {case['sparsity']!r}, computed {sparsities[chunk]!r}")
        problems += wrong_list.get(chunk, wrong_list.get(None, []))
        yield AttentionCase(name, indices.to(torch.int16), out, tuple(problems))


def _slots(x: Tensor, grid: BlockGrid) -> Tensor:
    """Frames [B, S, H, D] padded to whole blocks each, as a cache holds them."""
    frames = x.unflatten(1, (-1, grid.segment_tokens))
    padding = grid.slot_tokens - grid.segment_tokens
    return torch.nn.functional.pad(frames, (0, 0, 0, 0, 0, padding)).flatten(1, 2)


def _list_problem(stored: Any, computed: list[float]) -> dict[int | None, list[str]]:
    """What is wrong with the stored schedule, by chunk; under None when it concerns every chunk."""
    if stored is None:
        return {}
    if not isinstance(stored, list) or len(stored) != len(computed):
        return {None: [f"the schedule must have {len(computed)} sparsities"]}
    return {
        chunk: [f"the schedule says {theirs!r} for this chunk, computed {ours!r}"]
        for chunk, (theirs, ours) in enumerate(zip(stored, computed, strict=True))
        if not _close(theirs, ours)
    }


def _close(stored: Any, computed: float) -> bool:
    is_number = isinstance(stored, (int, float)) and not isinstance(stored, bool)
    return is_number and abs(stored - computed) <= _SCHEDULE_TOLERANCE
