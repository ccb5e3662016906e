"""What each policy lets a query block see, against the published rule written out in loops."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightforcing.kernels.reference import select_blocks
from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.selection import (
    PRESETS,
    BlockTopK,
    Dense,
    Hierarchical,
    KeyView,
    SelectionPolicy,
    SelectionRule,
    SlidingWindow,
    fixed_blocks,
    own_blocks,
)

ABSENT, ELIGIBLE, CANDIDATE, FORCED = range(4)


def in_order(frames: int, own: int = 3, blocks: int = 4) -> KeyView:
    """Slots in the order of their frames, as before a window wraps."""
    return KeyView(tuple(range(frames)), tuple(range(frames - own, frames)), blocks)


def released_rule(
    query: Tensor,
    frames: Sequence[Tensor],
    past: int,
    keep: tuple[int, int, int],
    top_k: int,
) -> set[tuple[int, int]]:
    """reference/light_forcing.md 2.2 for one query block of one head.

    Args: query [D]; frames in order of time, pooled keys [blocks, D] each; keep_frames,
    keep_sink, keep_near. Returns (frame, block) pairs.
    """
    keep_frames, keep_sink, keep_near = keep
    eligible = list(range(len(frames)))
    if past > keep_frames:
        middle = range(keep_sink, past - keep_near)
        scores = {f: float(query @ frames[f].mean(0)) for f in middle}
        best = sorted(middle, key=lambda f: -scores[f])[: keep_frames - keep_sink - keep_near]
        eligible = [*range(keep_sink), *best, *range(past - keep_near, len(frames))]
    blocks = [(float(query @ frames[f][b]), f, b) for f in eligible for b in range(len(frames[f]))]
    return {(f, b) for _, f, b in sorted(blocks, reverse=True)[:top_k]}


def lists_of(rule: SelectionRule, q: Tensor, k: Tensor, view: KeyView) -> list[list[set[int]]]:
    """Selected physical blocks by head and query block."""
    indices, counts = select_blocks(
        q,
        k,
        blocks_per_segment=view.blocks_per_frame,
        roles=rule.roles,
        keep_candidates=rule.keep_candidates,
        top_k=rule.top_k,
        own_blocks=None,
    )
    return [
        [set(row[:n].tolist()) for row, n in zip(indices[0, h], counts[0, h].tolist(), strict=True)]
        for h in range(q.shape[1])
    ]


@settings(max_examples=120, deadline=None)
@given(
    past=st.integers(1, 14),
    own=st.integers(1, 3),
    sink=st.integers(0, 2),
    near=st.integers(0, 3),
    middle=st.integers(0, 3),
    sparsity=st.floats(0.5, 0.95),
    seed=st.integers(0, 10**6),
)
def test_hierarchical_is_the_released_rule_wherever_frames_lie(
    past: int, own: int, sink: int, near: int, middle: int, sparsity: float, seed: int
) -> None:
    heads, queries, blocks, dim = 2, 3, 4, 8
    generator = torch.Generator().manual_seed(seed)
    total = past + own
    frames = torch.randn(total, heads, blocks, dim, generator=generator)
    q = torch.randn(1, heads, queries, dim, generator=generator)
    # A ring: which slot a frame lies in is arbitrary, and its index does not start at 0.
    slots = list(range(total))
    random.Random(seed).shuffle(slots)  # slots[i] holds the i-th frame
    slot_frames = [0] * total
    for order, slot in enumerate(slots):
        slot_frames[slot] = 100 + 2 * order
    view = KeyView(tuple(slot_frames), tuple(slots[past:]), blocks)
    k = torch.empty(1, heads, total, blocks, dim)
    for order, slot in enumerate(slots):
        k[0, :, slot] = frames[order]
    keep = (sink + near + middle, sink, near)
    rule = Hierarchical(*keep).rule(view, sparsity)
    eligible = total if past <= keep[0] else keep[0] + own
    top_k = min(int((1 - sparsity) * total * blocks), eligible * blocks)
    selected = lists_of(rule, q, k.flatten(2, 3), view)
    for h in range(heads):
        for row in range(queries):
            pooled = [frames[order, h] for order in range(total)]
            expected = released_rule(q[0, h, row], pooled, past, keep, max(top_k, 1))
            assert selected[h][row] == {slots[f] * blocks + b for f, b in expected}


def test_a_short_past_is_one_stage() -> None:
    policy = Hierarchical(6, 1, 2)
    assert set(policy.rule(in_order(9), 0.8).roles) == {ELIGIBLE}  # 6 past frames
    roles = policy.rule(in_order(10), 0.8).roles
    assert roles == (ELIGIBLE, *[CANDIDATE] * 4, *[ELIGIBLE] * 5)
    assert policy.rule(in_order(10), 0.8).keep_candidates == 3


def test_the_budget_counts_all_blocks_and_never_exceeds_the_eligible() -> None:
    view = in_order(21, blocks=24)
    assert PRESETS["short"].rule(view, 0.8982129373793589).top_k == 51
    rule = PRESETS["short"].rule(view, 0.3)  # 352 blocks asked, 9 eligible frames
    assert rule.top_k == 9 * 24
    q, k = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 21 * 24, 8)
    assert all(len(row) == 9 * 24 for row in lists_of(rule, q, k, view)[0])


def test_in_a_window_sink_and_near_are_of_the_frames_held() -> None:
    """Ring of 9: sink frame 0 in slot 0, frames 12..16 past and 17..19 own, wrapped."""
    view = KeyView((0, 17, 18, 19, 12, 13, 14, 15, 16), (1, 2, 3), 4)
    assert view.past_slots == (0, 4, 5, 6, 7, 8)
    rule = Hierarchical(3, 1, 1).rule(view, 0.9)
    own, middle = ELIGIBLE, CANDIDATE
    assert rule.roles == (ELIGIBLE, own, own, own, middle, middle, middle, middle, ELIGIBLE)
    assert rule.keep_candidates == 1


def test_guarantees_come_first_and_raise_a_budget_too_small_for_them() -> None:
    view = in_order(12, blocks=8)
    policy = Hierarchical(6, 1, 2, guarantee_sink=True, guarantee_own_block=True)
    assert policy.rule(view, 0.5).top_k == 48
    rule = policy.rule(view, 0.95)  # 4 blocks asked, 8 + 1 guaranteed
    assert (rule.top_k, rule.roles[0], rule.own_block) == (9, FORCED, True)
    own = torch.tensor(own_blocks(view, 16, 2, 2), dtype=torch.int32)
    q, k = torch.randn(1, 2, len(own), 4), torch.randn(1, 2, view.num_blocks, 4)
    indices, counts = select_blocks(
        q, k, blocks_per_segment=8, roles=rule.roles, keep_candidates=3, top_k=9, own_blocks=own
    )
    assert (counts == 9).all()
    for head in indices[0]:
        for row, block in zip(head.tolist(), own.tolist(), strict=True):
            assert set(row) == {*range(8), block}


def test_guarantees_are_off_by_default() -> None:
    rule = Hierarchical().rule(in_order(12), 0.9)
    assert FORCED not in rule.roles and not rule.own_block


def test_block_top_k_sees_everything() -> None:
    rule = BlockTopK().rule(in_order(21, blocks=24), 0.9)
    assert set(rule.roles) == {ELIGIBLE}
    assert rule.top_k == int((1 - 0.9) * 504)


@pytest.mark.parametrize(
    ("sink", "near", "frames"),
    [(1, 2, {0, 7, 8, 9, 10, 11}), (0, 0, {9, 10, 11}), (2, 99, set(range(12)))],
)
def test_a_sliding_window_is_sink_near_and_the_chunk(sink: int, near: int, frames: set) -> None:
    view = in_order(12)
    rule = SlidingWindow(sink, near).rule(view, 0.99)
    assert rule.is_fixed
    assert fixed_blocks(view, rule) == [4 * f + b for f in sorted(frames) for b in range(4)]
    assert rule.top_k == len(frames) * 4


def test_a_window_without_a_length_spends_the_budget() -> None:
    policy = SlidingWindow(sink_frames=1)
    frames = [
        policy.rule(in_order(21, blocks=24), s).top_k // 24 for s in (0.95, 0.8, 0.75, 0.5, 0.0)
    ]
    assert frames == [4, 4, 5, 10, 21]  # never without the chunk and the sink


def test_dense_has_no_rule() -> None:
    assert Dense().rule(in_order(12), 0.9) is None


@pytest.mark.parametrize(("query_block", "key_block"), [(4, 4), (8, 4), (4, 8), (3, 5), (64, 4)])
def test_own_blocks_hold_the_middle_of_their_query_block(query_block: int, key_block: int) -> None:
    tokens = 10
    per_frame = -(-tokens // key_block)
    view = KeyView((7, 5, 6, 0), (1, 2, 0), per_frame)
    expected = []
    for rows in torch.arange(3 * tokens).split(query_block):
        frame, token = divmod(int(rows[(len(rows) - 1) // 2]), tokens)
        expected.append((1, 2, 0)[frame] * per_frame + token // key_block)
    assert own_blocks(view, tokens, query_block, key_block) == expected


@pytest.mark.parametrize("policy", [Hierarchical(), BlockTopK(), SlidingWindow()])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.999])
def test_no_row_is_empty(policy: SelectionPolicy, sparsity: float) -> None:
    for frames in (4, 9, 10, 30):
        for blocks in (1, 2, 25):
            view = in_order(frames, blocks=blocks)
            assert 1 <= policy.rule(view, sparsity).top_k <= view.num_blocks


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hierarchical(2, 1, 2), "at least keep_sink"),
        (lambda: Hierarchical(6, -1, 2), "keep_sink"),
        (lambda: Hierarchical(-1, 0, 0), "keep_frames"),
        (lambda: SlidingWindow(-1), "sink_frames"),
        (lambda: SlidingWindow(1, -2), "near_frames"),
    ],
)
def test_counts_out_of_range_are_refused_in_one_line(make, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
