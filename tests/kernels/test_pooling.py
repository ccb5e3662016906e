"""Block means: of a block's own tokens, whatever lies in the padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightforcing.kernels import BlockGrid, pool_blocks
from lightforcing.kernels.ops import pool_blocks_triton

IMPLEMENTATIONS = pytest.mark.parametrize(
    "pool", [pool_blocks, pool_blocks_triton], ids=["reference", "triton"]
)
# segment_tokens, block_tokens
GRIDS = [(64, 64), (65, 64), (100, 32), (1, 16), (63, 64), (96, 24), (7, 3)]


def mean_by_hand(x: Tensor, segment: int, block: int, pitch: int) -> Tensor:
    """float64 means, one block at a time."""
    means = []
    for start in range(0, x.shape[1], pitch):
        for first in range(0, segment, block):
            last = min(first + block, segment)
            means.append(x[:, start + first : start + last].double().mean(1))
    return torch.stack(means, 2)  # [B, H, blocks, D]


@IMPLEMENTATIONS
@pytest.mark.parametrize("padded", [False, True], ids=["dense", "padded"])
@pytest.mark.parametrize("segment, block", GRIDS)
def test_means_are_those_of_a_loop(
    pool, segment: int, block: int, padded: bool, dtype: torch.dtype, device: torch.device
) -> None:
    grid = BlockGrid(segment, block)
    pitch = grid.slot_tokens if padded else segment
    x = torch.randn(2, 3 * pitch, 2, 40, device=device).to(dtype)
    x.unflatten(1, (3, pitch))[:, :, segment:] = float("nan")
    means = pool(x, grid, padded=padded)
    assert means.dtype == torch.float32
    expected = mean_by_hand(x, segment, block, pitch)
    torch.testing.assert_close(means.double(), expected, rtol=1e-5, atol=1e-6)


@IMPLEMENTATIONS
def test_strides_may_be_any(pool, device: torch.device) -> None:
    grid = BlockGrid(20, 16)
    permuted = torch.randn(2, 3, 60, 32, device=device).transpose(1, 2)
    torch.testing.assert_close(
        pool(permuted, grid, padded=False), pool(permuted.contiguous(), grid, padded=False)
    )
    capacity = torch.randn(2, 160, 3, 32, device=device)
    part = capacity[:, 32:96]
    torch.testing.assert_close(
        pool(part, grid, padded=True), pool(part.contiguous(), grid, padded=True)
    )


@IMPLEMENTATIONS
def test_half_a_segment_is_refused(pool, device: torch.device) -> None:
    x = torch.zeros(1, 30, 1, 32, device=device)
    with pytest.raises(ValueError, match=r"segments of 20 rows, got shape \(1, 30, 1, 32\)"):
        pool(x, BlockGrid(20, 16), padded=False)
    with pytest.raises(ValueError, match="slots of 32 rows"):
        pool(x, BlockGrid(20, 16), padded=True)


def test_a_grid_counts_its_short_block() -> None:
    grid = BlockGrid(1560, 64)
    assert (grid.blocks_per_segment, grid.slot_tokens, grid.tail_tokens) == (25, 1600, 24)
    grid = BlockGrid(1536, 64)
    assert (grid.blocks_per_segment, grid.slot_tokens, grid.tail_tokens) == (24, 1536, 64)
    with pytest.raises(ValueError, match="at least 1, got 0 and 64"):
        BlockGrid(0, 64)
