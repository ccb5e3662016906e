"""The two-stage rule, against a restatement in plain Python and the released code's choices."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from lightforcing.kernels import BlockGrid, check_block_lists, pool_blocks, select_blocks
from lightforcing.kernels.ops import pool_blocks_triton, select_blocks_triton

IMPLEMENTATIONS = pytest.mark.parametrize(
    "select", [select_blocks, select_blocks_triton], ids=["reference", "triton"]
)


def choose_by_hand(
    scores: list[float], roles: list[int], per_segment: int, keep: int, top_k: int, own: int | None
) -> list[int]:
    """The rule as sentences, for one query block."""
    scores = [-math.inf if math.isnan(s) else s for s in scores]
    segments = [scores[i : i + per_segment] for i in range(0, len(scores), per_segment)]
    means = [sum(s) / per_segment for s in segments]
    means = [-math.inf if math.isnan(m) else m for m in means]
    candidates = [i for i, role in enumerate(roles) if role == 2]
    best = sorted(candidates, key=lambda i: (-means[i], i))[: max(keep, 0)]
    open_segments = {i for i, role in enumerate(roles) if role in (1, 3)} | set(best)

    first, others = [], []
    for block in range(len(scores)):
        segment = block // per_segment
        if roles[segment] == 3 or (block == own and roles[segment] != 0):
            first.append(block)
        elif segment in open_segments:
            others.append(block)
    others.sort(key=lambda block: (-scores[block], block))
    return sorted((first + others)[:top_k])


def assert_chosen(
    select, q: Tensor, k: Tensor, per_segment: int, roles: list[int], keep: int, top_k: int,
    own: list[int] | None = None,
) -> None:  # fmt: skip
    own_blocks = None if own is None else torch.tensor(own, dtype=torch.int32, device=q.device)
    indices, counts = select(
        q, k, blocks_per_segment=per_segment, roles=roles, keep_candidates=keep, top_k=top_k,
        own_blocks=own_blocks,
    )  # fmt: skip
    assert indices.dtype == counts.dtype == torch.int32
    assert indices.shape == (*q.shape[:3], top_k) and counts.shape == q.shape[:3]
    check_block_lists(indices, counts, num_kv_blocks=k.shape[2])
    for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).view(-1, 3):
        scores = [float((q[b, h, row].double() * x.double()).sum()) for x in k[b, h]]
        one = None if own is None else own[row]
        expected = choose_by_hand(scores, roles, per_segment, keep, top_k, one)
        assert counts[b, h, row] == len(expected)
        assert indices[b, h, row].tolist() == expected + [-1] * (top_k - len(expected))


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    per_segment, segments = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    blocks = per_segment * segments
    rows = draw(st.integers(1, 2))
    # Few distinct values, so that ties of blocks and of segments are the rule.
    values = st.integers(-2, 2).map(float)
    if draw(st.booleans()):
        values |= st.sampled_from([math.inf, -math.inf, math.nan, -0.0, 1e30])
    return {
        "k": torch.tensor(draw(st.lists(values, min_size=blocks, max_size=blocks))),
        "q": torch.tensor(draw(st.lists(st.sampled_from([1.0, -1.0, 0.5]), min_size=rows,
                                        max_size=rows))),
        "per_segment": per_segment,
        "roles": draw(st.lists(st.integers(0, 3), min_size=segments, max_size=segments)),
        "keep": draw(st.integers(-1, segments + 1)),
        "top_k": draw(st.integers(1, blocks + 3)),
        "own": draw(st.none() | st.lists(st.integers(-1, blocks), min_size=rows, max_size=rows)),
    }  # fmt: skip


@IMPLEMENTATIONS
@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=cases())
def test_choice_equals_the_rule_in_words(select, case: dict[str, Any], device) -> None:
    q, k = case.pop("q").to(device), case.pop("k").to(device)
    assert_chosen(select, q.view(1, 1, -1, 1), k.view(1, 1, -1, 1), **case)


@IMPLEMENTATIONS
@pytest.mark.parametrize("head_dim", [1, 24, 128])
def test_every_batch_head_and_row_chooses_for_itself(select, head_dim: int, device) -> None:
    # Whole numbers: every order of summation gives the same score.
    q = torch.randint(-4, 5, (2, 3, 3, head_dim), device=device).float()
    k = torch.randint(-4, 5, (2, 3, 20, head_dim), device=device).float()
    roles = [3, 2, 2, 0, 2]
    assert_chosen(select, q, k, 4, roles, keep=1, top_k=7)
    assert_chosen(select, q, k, 4, roles, keep=1, top_k=7, own=[0, 14, 19])
    slots = k.transpose(1, 2).contiguous().transpose(1, 2)  # as it lies in a cache
    assert_chosen(select, q, slots, 4, roles, keep=2, top_k=9)


@IMPLEMENTATIONS
def test_more_queries_than_a_tile_and_uneven_sizes(select, device: torch.device) -> None:
    q = torch.randint(-4, 5, (1, 1, 17, 20), device=device).float()
    k = torch.randint(-4, 5, (1, 1, 65 * 2, 20), device=device).float()
    assert_chosen(select, q, k, 2, [2] * 65, keep=33, top_k=13)


@IMPLEMENTATIONS
def test_thousands_of_blocks(select, device: torch.device) -> None:
    q = torch.ones(1, 1, 1, 1, device=device)
    k = torch.randint(-1000, 1000, (1, 1, 8200, 1), device=device).float()
    assert_chosen(select, q, k, 25, [2] * 328, keep=100, top_k=700)


@IMPLEMENTATIONS
def test_all_candidates_kept_is_a_plain_top_k(select, device: torch.device) -> None:
    q, k = torch.randn(1, 2, 3, 16, device=device), torch.randn(1, 2, 24, 16, device=device)
    indices, _ = select(q, k, blocks_per_segment=4, roles=[2] * 6, keep_candidates=6, top_k=5)
    scores = q.double() @ k.double().transpose(2, 3)
    torch.testing.assert_close(indices.long(), scores.topk(5).indices.sort().values)


@IMPLEMENTATIONS
def test_masked_blocks_never_fill_the_list(select, device: torch.device) -> None:
    """The released code selects them when the budget exceeds what is eligible."""
    q, k = torch.randn(1, 1, 2, 16, device=device), torch.randn(1, 1, 12, 16, device=device)
    indices, counts = select(
        q, k, blocks_per_segment=3, roles=[0, 1, 2, 0], keep_candidates=0, top_k=8
    )
    assert counts.flatten().tolist() == [3, 3]
    assert indices.flatten().tolist() == [3, 4, 5, -1, -1, -1, -1, -1] * 2
    indices, counts = select(
        q, k, blocks_per_segment=3, roles=[0, 0, 2, 0], keep_candidates=0, top_k=2
    )
    assert counts.flatten().tolist() == [0, 0] and (indices == -1).all()


@IMPLEMENTATIONS
def test_forced_blocks_alone_over_budget_give_the_lowest_ids(select, device) -> None:
    q, k = torch.randn(1, 1, 1, 16, device=device), torch.randn(1, 1, 12, 16, device=device)
    own = torch.tensor([11], dtype=torch.int32, device=device)
    indices, counts = select(
        q, k, blocks_per_segment=4, roles=[1, 3, 1], keep_candidates=0, top_k=3, own_blocks=own
    )
    assert indices.flatten().tolist() == [4, 5, 6] and counts.item() == 3


@IMPLEMENTATIONS
def test_what_is_no_number_comes_last(select, device: torch.device) -> None:
    q = torch.ones(1, 1, 1, 1, device=device)
    nan, inf = math.nan, math.inf
    scores = torch.tensor([nan, -5.0, -inf, 1.0, nan, -2.0], device=device)
    assert_chosen(select, q, scores.view(1, 1, -1, 1), 1, [1] * 6, keep=0, top_k=3)
    assert_chosen(select, q, scores.view(1, 1, -1, 1), 1, [1] * 6, keep=0, top_k=5)
    # The mean of the first segment is no number; the second is the better one.
    scores = torch.tensor([inf, -inf, -5.0, -6.0], device=device)
    assert_chosen(select, q, scores.view(1, 1, -1, 1), 2, [2, 2], keep=1, top_k=2)


@IMPLEMENTATIONS
def test_zeros_of_both_signs_are_a_tie(select, device: torch.device) -> None:
    # Products of such numbers underflow to a zero that keeps its sign.
    q = torch.full((1, 1, 1, 1), 1e-30, device=device)
    k = torch.tensor([-1e-30, 1e-30, -1e-30, 1e-30], device=device).view(1, 1, -1, 1)
    indices, _ = select(q, k, blocks_per_segment=1, roles=[1] * 4, keep_candidates=0, top_k=2)
    assert indices.flatten().tolist() == [0, 1]


@IMPLEMENTATIONS
def test_roles_may_be_a_tensor(select, device: torch.device) -> None:
    q, k = torch.randn(1, 1, 2, 16, device=device), torch.randn(1, 1, 12, 16, device=device)
    some = {"blocks_per_segment": 3, "keep_candidates": 1, "top_k": 4}
    roles = torch.tensor([1, 2, 2, 0], dtype=torch.int32, device=device)
    for one, other in zip(
        select(q, k, roles=roles, **some), select(q, k, roles=roles.tolist(), **some), strict=True
    ):
        assert torch.equal(one, other)


@IMPLEMENTATIONS
@pytest.mark.parametrize("budget", [1, 4, 7, 20])
def test_limits_on_the_device_overrule_numbers(select, budget: int, device: torch.device) -> None:
    """And slots that hold nothing yet change no choice: a graph may see a whole cache."""
    q, k = torch.randn(1, 2, 3, 8, device=device), torch.randn(1, 2, 12, 8, device=device)
    rule = {"blocks_per_segment": 3, "keep_candidates": 1, "roles": [1, 2, 2, 1]}
    small, counts = select(q, k, **rule, top_k=budget)
    later = torch.cat([k, torch.full((1, 2, 6, 8), math.inf, device=device)], 2)
    whole = rule | {"keep_candidates": 99, "roles": [1, 2, 2, 1, 0, 0]}
    limits = torch.tensor([1, budget], dtype=torch.int32, device=device)
    wide, wide_counts = select(q, later, **whole, top_k=25, limits=limits)
    assert wide.shape[3] == 25 and (wide[..., budget:] == -1).all()
    assert torch.equal(wide[..., :budget], small) and torch.equal(wide_counts, counts)
    narrow, _ = select(q, later, **whole, top_k=3, limits=limits)
    assert narrow.shape[3] == 3


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    "change, message",
    [
        ({"top_k": 0}, "top_k must be at least 1 block, got 0"),
        ({"roles": [1, 1]}, "each of the 4 segments, got 2"),
        ({"blocks_per_segment": 5}, "12 blocks, not a whole number of segments of 5"),
        ({"own_blocks": torch.zeros(3, dtype=torch.int32)}, r"own_blocks must be \[2\]"),
    ],
)
def test_what_does_not_fit_is_refused(select, change: dict, message: str, device) -> None:
    q, k = torch.randn(1, 1, 2, 16, device=device), torch.randn(1, 1, 12, 16, device=device)
    some = {"blocks_per_segment": 3, "roles": [1] * 4, "keep_candidates": 1, "top_k": 4}
    with pytest.raises(ValueError, match=message):
        select(q, k, **(some | change))


def test_a_row_too_long_for_the_kernel_is_refused(device: torch.device) -> None:
    q, k = torch.zeros(1, 1, 1, 1, device=device), torch.zeros(1, 1, 20000, 1, device=device)
    with pytest.raises(ValueError, match="more than the 16384 of the kernel"):
        select_blocks_triton(
            q, k, blocks_per_segment=1, roles=[1] * 20000, keep_candidates=1, top_k=4
        )


@pytest.mark.parametrize("kind", ["reference", "triton"])
def test_the_released_choices(kind: str, golden_dir: Path, device: torch.device) -> None:
    pool, select = {
        "reference": (pool_blocks, select_blocks),
        "triton": (pool_blocks_triton, select_blocks_triton),
    }[kind]
    with safe_open(golden_dir / "light_forcing_attention.safetensors", "pt") as file:
        golden = json.loads(file.metadata()["golden"])
        grid = BlockGrid(golden["frame_tokens"], golden["block"])
        sink, near, keep = golden["keep_sink"], golden["keep_near"], golden["keep_frames"]
        # The interpreter is slow; these have no past, a short one, and a long one.
        for case in golden["cases"][:: 1 if kind == "reference" else 3]:
            name, past = f"c{case['chunk']}", case["past_frames"]
            q, k = (file.get_tensor(f"{name}.{x}").to(device) for x in "qk")
            middle = range(sink, past - near) if past > keep else ()
            segments = k.shape[1] // grid.segment_tokens
            indices, counts = select(
                pool(q, grid, padded=False),
                pool(k, grid, padded=False),
                blocks_per_segment=grid.blocks_per_segment,
                roles=[2 if i in middle else 1 for i in range(segments)],
                keep_candidates=keep - sink - near,
                top_k=case["topk"],
            )
            expected = file.get_tensor(f"{name}.kv_indices").int()
            assert torch.equal(indices.cpu(), expected), name
            assert (counts == case["topk"]).all()
