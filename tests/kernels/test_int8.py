"""Keys and queries in eight bits: what is rounded, how far the result is off, and the shift."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightforcing.kernels import BlockGrid, block_sparse_attention, quantise_blocks
from lightforcing.kernels.configs import INT8_BLOCK_SIZES
from lightforcing.kernels.ops import block_sparse_attention_triton, quantise_blocks_triton

BOTH_QUANTISE = pytest.mark.parametrize(
    "quantise", [quantise_blocks, quantise_blocks_triton], ids=["reference", "triton"]
)
BOTH_ATTEND = pytest.mark.parametrize(
    "attend", [block_sparse_attention, block_sparse_attention_triton], ids=["reference", "triton"]
)
# Relative L2 error of normal values against float64 without rounding to eight bits.
TOLERANCE = 2e-2


def slots(
    count: int, grid: BlockGrid, dtype: torch.dtype, device: torch.device, dim: int = 64
) -> Tensor:
    """Keys [2, count * slot_tokens, 3, dim] with NaN in their padding."""
    x = torch.randn(2, count, grid.slot_tokens, 3, dim)
    x[:, :, grid.segment_tokens :] = float("nan")
    return x.flatten(1, 2).to(device, dtype)


def quantised(x: Tensor, shift: Tensor, grid: BlockGrid, quantise: Any) -> tuple[Tensor, Tensor]:
    levels = torch.full_like(x, -99, dtype=torch.int8)
    scales = torch.empty(x.shape[0], x.shape[2], x.shape[1] // grid.block_tokens, device=x.device)
    quantise(x, shift, grid, out=levels, scales=scales)
    return levels, scales


@BOTH_QUANTISE
@pytest.mark.parametrize("segment, block", [(64, 64), (100, 64), (65, 16), (20, 128)])
def test_each_block_has_steps_of_its_own(
    segment: int, block: int, quantise: Any, dtype: torch.dtype, device: torch.device
) -> None:
    grid = BlockGrid(segment, block)
    x, shift = slots(2, grid, dtype, device), torch.randn(2, 3, 64, device=device)
    levels, scales = quantised(x, shift, grid, quantise)
    for slot in range(2):
        for number in range(grid.blocks_per_segment):
            first = slot * grid.slot_tokens + number * block
            rows = slice(first, min(first + block, slot * grid.slot_tokens + segment))
            wanted = x[:, rows].double() - shift[:, None].double()
            most = wanted.abs().amax((1, 3))  # [B, H]
            step = scales[:, :, slot * grid.blocks_per_segment + number]
            torch.testing.assert_close(step.double(), most / 127, rtol=1e-5, atol=0)
            # Half a step, and what float32 leaves of an exact half.
            off = levels[:, rows].double() * step[:, None, :, None].double() - wanted
            assert (off.abs() <= 0.5001 * step[:, None, :, None]).all()
            assert levels[:, rows].abs().amax() == 127
    padding = levels.unflatten(1, (2, -1))[:, :, segment:]
    assert (padding == -99).all()


@BOTH_QUANTISE
def test_a_block_of_nothing_but_the_shift_is_zero(quantise: Any, device: torch.device) -> None:
    grid = BlockGrid(64, 64)
    shift = torch.ones(1, 1, 64, device=device)
    x = torch.ones(1, 64, 1, 64, device=device, dtype=torch.float16)
    levels, scales = quantised(x, shift, grid, quantise)
    assert (levels == 0).all() and (scales == 0).all()


@BOTH_QUANTISE
def test_it_writes_into_a_part_of_a_cache(
    quantise: Any, dtype: torch.dtype, device: torch.device
) -> None:
    """Views with strides of the whole; what lies beside them stays."""
    grid = BlockGrid(20, 16)
    whole = torch.randn(2, 4, grid.slot_tokens, 3, 64).to(device, dtype)
    levels = torch.zeros(whole.shape, dtype=torch.int8, device=device)
    scales = torch.zeros(2, 3, 8, device=device)
    some, blocks = slice(1, 3), slice(2, 6)
    shift = torch.zeros(2, 3, 64, device=device)
    quantise(
        whole[:, some].flatten(1, 2), shift, grid, out=levels[:, some].flatten(1, 2),
        scales=scales[:, :, blocks],
    )  # fmt: skip
    expected, steps = quantised(whole[:, some].flatten(1, 2), shift, grid, quantise_blocks)
    own = levels[:, some, : grid.segment_tokens]
    assert (own - expected.unflatten(1, (2, -1))[:, :, : grid.segment_tokens]).abs().amax() <= 1
    torch.testing.assert_close(scales[:, :, blocks], steps)
    assert (levels[:, [0, 3]] == 0).all() and (scales[:, :, [0, 1, 6, 7]] == 0).all()


def case(
    blocks: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    offset: float = 0.0,
    dim: int = 64,
) -> dict[str, Any]:
    """300 queries in one segment over four slots of 100 keys; counts from 0 to 5."""
    q_grid, kv_grid = BlockGrid(300, blocks[0]), BlockGrid(100, blocks[1])
    k, v = (slots(4, kv_grid, dtype, device, dim) for _ in "kv")
    k += offset * torch.randn(2, 1, 3, dim).to(device, dtype)
    rows, total = q_grid.blocks_per_segment, 4 * kv_grid.blocks_per_segment
    order = torch.rand(2, 3, rows, total).argsort(3)
    width = min(total, 5)
    counts = torch.randint(0, width + 1, (2, 3, rows)).int()
    counts[0, 0, 0], counts[0, 0, 1] = 0, width
    return {
        "q": torch.randn(2, 300, 3, dim).to(device, dtype),
        "k": k,
        "v": v,
        "kv_indices": order[..., :width].sort(3).values.int().to(device),
        "kv_counts": counts.to(device),
        "q_grid": q_grid,
        "kv_grid": kv_grid,
    }


def mean_key(x: dict[str, Any]) -> Tensor:
    grid = x["kv_grid"]
    real = x["k"].unflatten(1, (-1, grid.slot_tokens))[:, :, : grid.segment_tokens]
    return real.float().mean((1, 2))


def in_eight_bits(x: dict[str, Any], shift: Tensor | None = None) -> dict[str, Any]:
    shift = mean_key(x) if shift is None else shift
    levels, scales = quantised(x["k"], shift, x["kv_grid"], quantise_blocks)
    return {**x, "k": levels, "k_scales": scales}


def exact(x: dict[str, Any]) -> Tensor:
    return block_sparse_attention(**{**x, **{name: x[name].double() for name in "qkv"}})


def relative_error(out: Tensor, expected: Tensor) -> float:
    assert not out.isnan().any()
    return float((out.double() - expected).norm() / expected.norm())


@BOTH_ATTEND
@pytest.mark.parametrize("blocks", INT8_BLOCK_SIZES, ids=str)
def test_it_is_near_the_exact_result(
    blocks: tuple[int, int], attend: Any, dtype: torch.dtype, device: torch.device
) -> None:
    x = case(blocks, dtype, device)
    out = torch.full_like(x["q"], float("nan"))
    assert attend(**in_eight_bits(x), out=out) is out
    assert relative_error(out, exact(x)) <= TOLERANCE
    assert (out[0, : blocks[0], 0] == 0).all()  # an empty list


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("blocks", INT8_BLOCK_SIZES, ids=str)
def test_the_kernel_is_its_reference(
    blocks: tuple[int, int], dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Which rounds the same queries, but where one lies half-way between two levels."""
    x = in_eight_bits(case(blocks, dtype, device, dim=dim))
    x["q"][0, 5] = 0.0  # a row without a largest value
    expected = block_sparse_attention(**{**x, "q": x["q"].float(), "v": x["v"].float()}).double()
    tolerance = {torch.float32: 3e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert relative_error(block_sparse_attention_triton(**x), expected) <= tolerance


def test_the_reference_is_the_formula(device: torch.device) -> None:
    """One query at a time in float64, from rounded rows and rounded blocks."""
    x = case((64, 64), torch.float32, device)
    shift = mean_key(x)
    y = in_eight_bits(x, shift)
    out = block_sparse_attention(**y)
    for batch, head, row in ((0, 0, 70), (0, 0, 127), (1, 2, 299)):
        q = x["q"][batch, row, head].double()
        q = (q / (q.abs().max() / 127)).round() * (q.abs().max() / 127)
        count = int(x["kv_counts"][batch, head, row // 64])
        listed = x["kv_indices"][batch, head, row // 64, :count].tolist()
        keys, values = [], []
        for block in listed:
            own = slice(block * 64, block * 64 + (36 if block % 2 else 64))
            k = x["k"][batch, own, head].double() - shift[batch, head].double()
            step = k.abs().max() / 127
            keys.append((k / step).round() * step)
            values.append(x["v"][batch, own, head].double())
        if not listed:
            continue
        weights = (torch.cat(keys) @ q / math.sqrt(64)).softmax(0)
        expected = weights @ torch.cat(values)
        torch.testing.assert_close(out[batch, row, head].double(), expected, rtol=5e-3, atol=5e-3)


def test_a_common_offset_of_the_keys_costs_nothing_with_a_shift(
    dtype: torch.dtype, device: torch.device
) -> None:
    """Keys of trained models lie far from zero, in a direction of their own for every head."""
    x = case((64, 64), dtype, device, offset=10.0)
    expected = exact(x)
    smooth = block_sparse_attention(**in_eight_bits(x))
    rough = block_sparse_attention(**in_eight_bits(x, torch.zeros_like(mean_key(x))))
    assert relative_error(smooth, expected) <= 5 * TOLERANCE
    assert relative_error(rough, expected) > 2 * relative_error(smooth, expected)


@BOTH_ATTEND
def test_scales_belong_to_keys_of_eight_bits(attend: Any, device: torch.device) -> None:
    x = case((64, 64), torch.float16, device)
    y = in_eight_bits(x)
    with pytest.raises(ValueError, match="k_scales belong to keys of int8"):
        attend(**{**x, "k_scales": y["k_scales"]})
    with pytest.raises(ValueError, match="k_scales belong to keys of int8"):
        attend(**{**y, "k_scales": None})
    with pytest.raises(ValueError, match=r"k_scales must be float32 .* = \(2, 3, 8\)"):
        attend(**{**y, "k_scales": y["k_scales"][:, :, 1:]})


def test_blocks_that_the_kernel_cannot_do_are_refused(device: torch.device) -> None:
    x = in_eight_bits(case((64, 32), torch.float16, device))
    with pytest.raises(ValueError, match=r"with keys of int8, got \(64, 32\)"):
        block_sparse_attention_triton(**x)


@BOTH_QUANTISE
def test_quantising_says_what_it_expected(quantise: Any, device: torch.device) -> None:
    grid = BlockGrid(64, 64)
    x, out = torch.zeros(1, 64, 1, 64), torch.zeros(1, 64, 1, 64, dtype=torch.int8)
    x, out = x.to(device, torch.float16), out.to(device)
    shift, scales = torch.zeros(1, 1, 64, device=device), torch.zeros(1, 1, 1, device=device)
    with pytest.raises(ValueError, match=r"shift must be float32 \(1, 1, 64\)"):
        quantise(x, shift.half(), grid, out=out, scales=scales)
    with pytest.raises(ValueError, match="out must be int8"):
        quantise(x, shift, grid, out=x, scales=scales)
    with pytest.raises(ValueError, match=r"scales must be float32 .* = \(1, 1, 1\)"):
        quantise(x, shift, grid, out=out, scales=scales[..., :0])
