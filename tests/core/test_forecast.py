"""What is forecast is what a run reports, whatever the settings."""

from __future__ import annotations

import pytest
import torch

from lightforcing.lightforcing_core.backends import REFERENCE
from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.forecast import forecast
from lightforcing.lightforcing_core.kv_cache import CacheSpec, KVCache
from lightforcing.lightforcing_core.schedule import ChunkAwareGrowth, HandDrawn, Timeline
from lightforcing.lightforcing_core.selection import (
    BlockTopK,
    Dense,
    Hierarchical,
    SlidingWindow,
)
from lightforcing.lightforcing_core.sparse import SparseAttention
from lightforcing.lightforcing_core.sparse_settings import PassBudgets, SparseSettings

LAYERS, TOKENS, STEPS = 3, 10, 2


def _densities(
    settings: SparseSettings, timeline: Timeline, sink: int
) -> list[tuple[float, float]]:
    """(sparsity, density) of each chunk, as attention reports it after its denoising steps."""
    capacity = timeline.visible_frames(timeline.num_chunks - 1)
    spec = CacheSpec(1, LAYERS, 2, 8, TOKENS, capacity, sink, 3, torch.float32)
    cache = KVCache(spec, "cpu")
    attention = SparseAttention(cache, settings, timeline, REFERENCE)
    reports = []
    for chunk, length in enumerate(timeline.chunk_frames):
        end = timeline.end_frame(chunk)
        cache.enter(range(end - length, end))
        attention.begin_chunk(chunk)
        for step in (*range(STEPS), None):
            if step is None:
                statistics = attention.tally()()
                reports.append((statistics.sparsity, statistics.density))
            attention.begin_pass(step)
            for layer in range(LAYERS):
                attention(layer, *torch.randn(3, 1, length * TOKENS, 2, 8))
        cache.commit()
    return reports


@pytest.mark.parametrize(
    ("lengths", "window", "sink"),
    [((2, 2, 2, 2, 1), -1, 0), ((1, 3, 3, 3), -1, 0), ((2,) * 6, 5, 1)],
)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"policy": BlockTopK()},
        {"policy": Hierarchical(2, 1, 1, guarantee_sink=True)},
        {"policy": SlidingWindow(1, None)},
        {"policy": Dense()},
        {"dense_chunks": 3},
        {"keep_blocks": 3},
        {"keep_blocks": 500},
        {"budgets": PassBudgets(first_step=-0.2)},
        {"budgets": PassBudgets(first_layers=1)},
        {"schedule": HandDrawn((0.1, 0.9, 0.0, 0.5))},
    ],
    ids=str,
)
def test_the_forecast_is_what_comes(
    lengths: tuple[int, ...], window: int, sink: int, changes: dict[str, object]
) -> None:
    base = {"schedule": ChunkAwareGrowth(0.7, 0.9), "backend": "reference"}
    settings = SparseSettings(**{**base, **changes}, query_block_tokens=4, key_block_tokens=3)
    timeline = Timeline(lengths, window_frames=window)
    got = forecast(settings, timeline, frame_tokens=TOKENS, num_layers=LAYERS, num_steps=STEPS)
    expected = _densities(settings, timeline, sink)
    assert [chunk.density for chunk in got.chunks] == pytest.approx([d for _, d in expected])
    assert [chunk.sparsity for chunk in got.chunks] == pytest.approx([s for s, _ in expected])


def test_the_density_of_a_video_weighs_chunks_by_their_pairs() -> None:
    timeline = Timeline((3,) * 7)
    settings = SparseSettings()
    got = forecast(settings, timeline, frame_tokens=1536, num_layers=30, num_steps=4)
    assert got.chunks[0].density == 1
    pairs = [3 * 3 * (i + 1) for i in range(7)]
    kept = sum(p * c.density for p, c in zip(pairs, got.chunks, strict=True))
    assert got.density == pytest.approx(kept / sum(pairs))
    dense = forecast(None, timeline, frame_tokens=1536, num_layers=30, num_steps=4)
    assert dense.density == 1 and all(chunk.sparsity == 0 for chunk in dense.chunks)


def test_counts_below_one_are_refused() -> None:
    with pytest.raises(UserError, match="number of layers must be at least 1, got 0"):
        forecast(None, Timeline((3,)), frame_tokens=1, num_layers=0, num_steps=1)
