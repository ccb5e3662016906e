"""A record says what attention saw, wherever frames lie; its picture shows it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lightforcing.lightforcing_core.backends import REFERENCE
from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.kv_cache import CacheSpec, KVCache
from lightforcing.lightforcing_core.palette import PAPER, RED
from lightforcing.lightforcing_core.schedule import Timeline, UniformSparsity
from lightforcing.lightforcing_core.selection import BlockTopK, Hierarchical, SelectionPolicy
from lightforcing.lightforcing_core.selection_record import SelectionRecord, record_selection
from lightforcing.lightforcing_core.sparse import SparseAttention
from lightforcing.lightforcing_core.sparse_settings import PassBudgets, SparseSettings
from lightforcing.lightforcing_core.sparsity_map import draw_sparsity_map

LAYERS, HEADS, TOKENS, CHUNK = 3, 2, 10, 2


def _run(
    policy: SelectionPolicy, *, window: int = 5, chunks: int = 4, first_layers: int = 0
) -> Iterator[tuple[SparseAttention, int]]:
    """Attention as each chunk leaves it, with random queries and keys."""
    settings = SparseSettings(
        schedule=UniformSparsity(0.7),
        policy=policy,
        query_block_tokens=4,
        key_block_tokens=3,
        budgets=PassBudgets(first_layers=first_layers),
        backend="reference",
    )
    spec = CacheSpec(2, LAYERS, HEADS, 8, TOKENS, window, 1, 3, torch.float32)
    cache = KVCache(spec, "cpu")
    timeline = Timeline((CHUNK,) * chunks, window_frames=window)
    attention = SparseAttention(cache, settings, timeline, REFERENCE)
    for chunk in range(chunks):
        cache.enter(range(chunk * CHUNK, (chunk + 1) * CHUNK))
        attention.begin_chunk(chunk)
        for step in (0, None):
            attention.begin_pass(step)
            for layer in range(LAYERS):
                attention(layer, *torch.randn(3, 2, CHUNK * TOKENS, HEADS, 8))
            if step == 0:
                yield attention, chunk
        cache.commit()


def _last(run: Iterator[tuple[SparseAttention, int]]) -> tuple[SparseAttention, int]:
    """The last of four chunks, left open."""
    return next(state for state in run if state[1] == 3)


@pytest.mark.parametrize("policy", [BlockTopK(), Hierarchical(2, 1, 1)], ids=lambda p: p.kind)
def test_every_bit_is_an_entry_of_the_plan(policy: SelectionPolicy) -> None:
    for attention, chunk in _run(policy):
        record = record_selection(attention, chunk)
        frames = attention.cache.slot_frames
        assert record.key_frames == tuple(sorted(frames))
        assert record.query_frames == (2 * chunk, 2 * chunk + 1)
        if not chunk:
            assert record.bits == (None,) * LAYERS
            assert record.share().tolist() == [[1.0] * 8]
            continue
        for layer, (indices, counts) in attention.plans.items():
            for head in range(HEADS):
                share = record.share(layer, head)
                assert share.shape == (counts.shape[-1], len(frames) * 4)
                for row in range(share.shape[0]):
                    kept = indices[0, head, row, : counts[0, head, row]].tolist()
                    expected = sorted((frames[block // 4], block % 4) for block in kept)
                    columns = np.flatnonzero(share[row])
                    got = [(record.key_frames[c // 4], c % 4) for c in columns.tolist()]
                    assert got == expected


def test_means_are_over_layers_and_heads() -> None:
    attention, chunk = _last(_run(BlockTopK(), first_layers=1))
    record = record_selection(attention, chunk)
    assert record.bits[0] is None and record.share(0).min() == 1
    single = [[record.share(layer, head) for head in range(HEADS)] for layer in range(LAYERS)]
    np.testing.assert_allclose(record.share(2), np.mean(single[2], axis=0))
    np.testing.assert_allclose(record.share(head=1), np.mean([m[1] for m in single], axis=0))
    np.testing.assert_allclose(record.share(), np.mean(single, axis=(0, 1)), rtol=1e-6)


def test_what_a_row_holds_past_its_count_does_not_count() -> None:
    attention, chunk = _last(_run(BlockTopK()))
    before = record_selection(attention, chunk).share()
    for layer, (indices, counts) in attention.plans.items():
        wider = torch.cat([indices, torch.full_like(indices[..., :2], -1)], dim=-1)
        plan = attention._plans[layer]
        attention._plans[layer] = type(plan)(plan.prepared, wider, counts)
    np.testing.assert_array_equal(record_selection(attention, chunk).share(), before)


def _record(chunk: int, frames: int, blocks: int = 4) -> SelectionRecord:
    kept = np.zeros((1, frames * blocks, frames * blocks), np.uint8)
    kept[0, 0, 0] = 1
    own = tuple(range(chunk * frames, (chunk + 1) * frames))
    bits = (np.packbits(kept, axis=-1),)
    return SelectionRecord(chunk, own, own, frames * blocks, blocks, 1, 1, bits)


def test_the_picture_shows_kept_and_hidden_blocks() -> None:
    picture = draw_sparsity_map([_record(0, 2), _record(1, 2)])
    colors = {color for _, color in picture.getcolors(1 << 20)}
    darkest, hidden = (10, 38, 84), (244, 245, 247)
    assert {PAPER, RED, darkest, hidden} <= colors


@pytest.mark.parametrize(("chunks", "frames", "blocks"), [(1, 1, 1), (60, 3, 8), (2, 3, 400)])
def test_any_video_fits_a_page(chunks: int, frames: int, blocks: int) -> None:
    records = [_record(chunk, frames, blocks) for chunk in range(chunks)]
    picture = draw_sparsity_map(records)
    assert 700 < picture.width <= 1300 and 200 < picture.height <= 900


def test_a_layer_that_is_not_there_is_refused() -> None:
    record = _record(0, 1)
    with pytest.raises(UserError, match="no layer 2: the model has 1"):
        record.share(layer=1)
    with pytest.raises(UserError, match="no head 3"):
        draw_sparsity_map([record], head=2)
    with pytest.raises(UserError, match="no record"):
        draw_sparsity_map([])
