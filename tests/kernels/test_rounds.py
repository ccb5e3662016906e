"""Work dealt to multiprocessors in rounds, and the parts of cut tiles joined again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightforcing.kernels import BlockGrid, block_sparse_attention
from lightforcing.kernels.reference import merge_parts
from lightforcing.kernels.rounds import Rounds, plan_rounds
from lightforcing.kernels.triton_merge import plan_merge


def merge_parts_triton(
    parts: Tensor, log_sums: Tensor, out: Tensor, first_tile: int, q_grid: BlockGrid
) -> Tensor:
    plan_merge(parts, log_sums, out, first_tile, q_grid).run()
    return out


IMPLEMENTATIONS = pytest.mark.parametrize(
    "merge", [merge_parts, merge_parts_triton], ids=["reference", "triton"]
)


@IMPLEMENTATIONS
@pytest.mark.parametrize("first_tile", [0, 3, 11])
@pytest.mark.parametrize("segment", [32, 40])
def test_attention_to_parts_merges_into_attention_to_all(
    merge, segment: int, first_tile: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Lists cut in three, some parts empty, some lists empty altogether; other tiles stay."""
    batch, heads, num_parts = 2, 2, 3
    q_grid, kv_grid = BlockGrid(segment, 16), BlockGrid(16, 16)
    q = torch.randn(batch, 2 * segment, heads, 64, device=device).double()
    k, v = (torch.randn(batch, 8 * 16, heads, 64, device=device).double() for _ in "kv")
    rows = 2 * q_grid.blocks_per_segment
    order = torch.rand(batch, heads, rows, 8, device=device).argsort(3).int()
    counts = torch.randint(0, 7, (batch, heads, rows), dtype=torch.int32, device=device)
    counts[0, 0, 0], counts[1, 1, -1] = 0, 1
    grids = {"q_grid": q_grid, "kv_grid": kv_grid}
    expected = block_sparse_attention(q, k, v, order, counts, **grids)

    tiles = batch * heads * rows
    parts = torch.empty(tiles, num_parts, 16, 64, device=device)
    log_sums = torch.empty(tiles, num_parts, 16, device=device)
    for tile in range(tiles):
        b, h, row = tile // rows // heads, tile // rows % heads, tile % rows
        segment_id, block = divmod(row, q_grid.blocks_per_segment)
        at = segment_id * segment + block * 16
        tile_q = q[b, at : at + min(16, segment - block * 16), h]
        count = int(counts[b, h, row])
        for part in range(num_parts):
            ids = order[b, h, row, count * part // 3 : count * (part + 1) // 3].tolist()
            tokens = [i * 16 + t for i in ids for t in range(16)]
            scores = tile_q @ k[b, tokens, h].T / 8
            size = len(tile_q)
            log_sums[tile, part, :size] = scores.logsumexp(1).float() / torch.log(torch.tensor(2.0))
            parts[tile, part, :size] = (scores.softmax(1) @ v[b, tokens, h]).float()
    start = torch.full(q.shape, 7.0, device=device, dtype=dtype)
    out = merge(parts[first_tile:], log_sums[first_tile:], start.clone(), first_tile, q_grid)

    is_merged = torch.zeros(q.shape[:3], dtype=torch.bool, device=device)
    for tile in range(first_tile, tiles):
        segment_id, block = divmod(tile % rows, q_grid.blocks_per_segment)
        at = segment_id * segment + block * 16
        end = min(at + 16, (segment_id + 1) * segment)
        is_merged[tile // rows // heads, at:end, tile // rows % heads] = True
    assert (out[~is_merged] == 7).all()
    tolerance = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
    error = (out.double() - expected)[is_merged]
    assert error.norm() <= tolerance * expected[is_merged].norm()


def test_the_last_rounds_tiles_are_cut() -> None:
    """432 tiles on 132 multiprocessors: three full rounds, and 36 tiles for 108 or more."""
    rounds = plan_rounds(432, 51, 132)
    assert rounds == Rounds(396, 3)
    assert plan_rounds(132 * 3, 51, 132) == Rounds(396, 1)
    assert plan_rounds(432, 2, 132) == Rounds(432, 1)  # lists too short to gain by it


@given(st.integers(1, 3000), st.integers(1, 600), st.integers(1, 200))
def test_cutting_never_takes_longer_and_loses_nothing(tiles: int, steps: int, sms: int) -> None:
    rounds = plan_rounds(tiles, steps, sms)
    assert 0 <= rounds.whole_tiles <= tiles
    assert 1 <= rounds.num_parts <= steps
    assert (rounds.num_parts == 1) == (rounds.whole_tiles == tiles)
    if rounds.num_parts > 1:
        cut = tiles - rounds.whole_tiles
        after = rounds.whole_tiles // sms * steps
        after += -(-cut * rounds.num_parts // sms) * -(-steps // rounds.num_parts)
        assert rounds.whole_tiles % sms == 0
        assert after < -(-tiles // sms) * steps
