"""Norm, rotary, cache write and pooling in one: as the modules do them one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightforcing.kernels import BlockGrid, pool_blocks
from lightforcing.kernels.eight_bit import Scaling
from lightforcing.kernels.reference import project_blocks
from lightforcing.kernels.triton_projection import project_blocks_triton

IMPLEMENTATIONS = pytest.mark.parametrize(
    "project", [project_blocks, project_blocks_triton], ids=["reference", "triton"]
)
EPS = 1e-6


def rotated(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """float64, with complex numbers; the roundings to x's type in between are kept."""
    wide = x.double()
    normed = wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    normed = (normed.to(x.dtype) * weight.to(x.dtype)).double().unflatten(-1, (heads, -1))
    turned = torch.view_as_complex(normed.unflatten(-1, (-1, 2)).contiguous())
    turned = turned * torch.complex(cos.double(), sin.double())[:, None]
    return torch.view_as_real(turned).flatten(-2)


@IMPLEMENTATIONS
@pytest.mark.parametrize("blocks", [(16, 16), (32, 16), (128, 64)], ids=str)
@pytest.mark.parametrize("tokens", [32, 40, 5], ids=lambda n: f"{n} tokens a slot")
@pytest.mark.parametrize("batch", [1, 2])
def test_is_what_the_modules_do(
    project, batch: int, tokens: int, blocks: tuple[int, int], dtype: torch.dtype, device
) -> None:
    heads, head_dim, slots = 3, 64, 5
    width = heads * head_dim
    open_slots = torch.tensor([3, 1], dtype=torch.int32, device=device)
    q_grid, kv_grid = BlockGrid(2 * tokens, blocks[0]), BlockGrid(tokens, blocks[1])
    x_q, x_k, x_v = (torch.randn(batch, 2 * tokens, width, device=device).to(dtype) for _ in "qkv")
    weights = [torch.randn(width, device=device).to(dtype) for _ in "qk"]
    angles = torch.randn(2 * tokens, head_dim // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    shape = batch, slots, kv_grid.slot_tokens, heads, head_dim
    keys, values = (torch.full(shape, 9.0, device=device, dtype=dtype) for _ in "kv")
    blocks_in_all = slots * kv_grid.blocks_per_segment
    pooled = torch.full((batch, heads, blocks_in_all, head_dim), 9.0, device=device)

    q, pooled_q = project(
        x_q, x_k, x_v, *weights, EPS, cos, sin, keys, values, pooled, open_slots,
        q_grid=q_grid, kv_grid=kv_grid,
    )  # fmt: skip

    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]

    def close(got: Tensor, expected: Tensor) -> None:
        assert (got.double() - expected).norm() <= tolerance * expected.norm()

    close(q, rotated(x_q, weights[0], cos, sin, heads))
    expected_k = rotated(x_k, weights[1], cos, sin, heads).unflatten(1, (2, -1))
    for segment, slot in enumerate((3, 1)):
        close(keys[:, slot, :tokens], expected_k[:, segment])
        own = x_v.unflatten(1, (2, -1))[:, segment].unflatten(-1, (heads, -1))
        assert torch.equal(values[:, slot, :tokens], own)
    for x in (keys, values):
        assert (x[:, :, tokens:] == 9).all() and (x[:, [0, 2, 4]] == 9).all()
    # Means of what was written, not of what was meant.
    torch.testing.assert_close(pooled_q, pool_blocks(q, q_grid, padded=False), rtol=1e-5, atol=1e-5)
    per_slot = kv_grid.blocks_per_segment
    of_slots = pooled.unflatten(2, (slots, per_slot))
    means = pool_blocks(keys.flatten(1, 2), kv_grid, padded=True).unflatten(2, (slots, per_slot))
    torch.testing.assert_close(of_slots[:, :, [3, 1]], means[:, :, [3, 1]], rtol=1e-5, atol=1e-5)
    assert (of_slots[:, :, [0, 2, 4]] == 9).all()


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_k": (1, 32, 64)}, "must be .B, S, H . D. and alike"),
        ({"values": (1, 4, 16, 2, 32)}, "keys and values must be"),
        ({"pooled": (1, 2, 3, 32)}, "pooled_keys must be"),
        ({"slots": 2}, "open slots of 16 tokens"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    project, change: dict, message: str, device: torch.device
) -> None:
    shapes = {"x_k": (1, 16, 64), "values": (1, 3, 16, 2, 32), "pooled": (1, 2, 3, 32)} | change
    x = torch.randn(1, 16, 64, device=device)
    weight, cos = nn.Parameter(torch.ones(64, device=device)), torch.ones(16, 16, device=device)
    keys = torch.zeros(1, 3, 16, 2, 32, device=device)
    pooled = torch.zeros(1, 2, 2 if "pooled" in change else 3, 32, device=device)
    slots = torch.zeros(shapes.get("slots", 1), dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=message):
        project(
            x, torch.zeros(shapes["x_k"], device=device), x, weight, weight, EPS, cos, cos, keys,
            torch.zeros(shapes["values"], device=device), pooled, slots,
            q_grid=BlockGrid(16, 16), kv_grid=BlockGrid(16, 16),
        )  # fmt: skip


@IMPLEMENTATIONS
def test_without_pooling_and_from_one_product(project, dtype: torch.dtype, device) -> None:
    """Rows of queries, keys and values may lie side by side, and slots need no blocks."""
    heads, head_dim, tokens = 3, 64, 70
    width = heads * head_dim
    joined = torch.randn(1, 2 * tokens, 3 * width, device=device).to(dtype)
    weight = torch.randn(width, device=device).to(dtype)
    angles = torch.randn(2 * tokens, head_dim // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    slots = torch.tensor([0, 2], dtype=torch.int32, device=device)
    keys, values = (
        torch.full((1, 3, tokens, heads, head_dim), 9.0, device=device, dtype=dtype) for _ in "kv"
    )
    whole = BlockGrid(tokens, tokens)
    q, pooled_q = project(
        *joined.split(width, 2), weight, weight, EPS, cos, sin, keys, values, None, slots,
        q_grid=BlockGrid(2 * tokens, 16), kv_grid=whole,
    )  # fmt: skip
    assert pooled_q is None
    x_q, x_k, x_v = (x.contiguous() for x in joined.split(width, 2))
    rotated_k = rotated(x_k, weight, cos, sin, heads).unflatten(1, (2, -1))
    for got, expected in (
        (q, rotated(x_q, weight, cos, sin, heads)),
        (keys[:, [0, 2]], rotated_k),
    ):
        tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        assert (got.double() - expected).norm() <= tolerance * expected.norm()
    assert torch.equal(values[:, [0, 2]].flatten(1, 2).flatten(2), x_v)
    assert (keys[:, 1] == 9).all() and (values[:, 1] == 9).all()


@IMPLEMENTATIONS
@pytest.mark.parametrize("kind", ["float", "sums"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("batch", [1, 2])
def test_products_of_eight_bit_numbers_are_scaled_on_the_way(
    project, kind: str, has_bias: bool, batch: int, dtype: torch.dtype, device
) -> None:
    """As from the values that the products stand for, which are not rounded in between."""
    heads, head_dim, tokens = 3, 64, 40
    width = heads * head_dim
    joined = torch.randn(batch, 2 * tokens, 3 * width, device=device) * 2000
    joined = joined.int() if kind == "sums" else joined.to(dtype)
    scaling = Scaling(
        torch.rand(batch * 2 * tokens, 1, device=device) / 50,
        torch.rand(1, 3 * width, device=device) / 50,
        torch.randn(3 * width, device=device).to(dtype) if has_bias else None,
    )
    values = joined.double().flatten(0, 1) * scaling.rows.double() * scaling.columns.double()
    values = values + scaling.bias.double() if has_bias else values
    x_q, x_k, x_v = values.unflatten(0, (batch, -1)).chunk(3, 2)
    weights = [torch.randn(width, device=device).to(dtype) for _ in "qk"]
    angles = torch.randn(2 * tokens, head_dim // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    slots = torch.tensor([3, 1], dtype=torch.int32, device=device)
    q_grid, kv_grid = BlockGrid(2 * tokens, 32), BlockGrid(tokens, 16)
    shape = batch, 5, kv_grid.slot_tokens, heads, head_dim
    keys, cached = (torch.full(shape, float("nan"), device=device, dtype=dtype) for _ in "kv")
    pooled = torch.zeros(batch, heads, 5 * kv_grid.blocks_per_segment, head_dim, device=device)
    q, _ = project(
        *joined.chunk(3, 2), *weights, EPS, cos, sin, keys, cached, pooled, slots,
        q_grid=q_grid, kv_grid=kv_grid, scaling=scaling,
    )  # fmt: skip
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    of_slots = (x[:, [3, 1], :tokens].flatten(1, 2) for x in (keys, cached))
    for got, expected in zip(
        (q, *of_slots),
        (
            rotated(x_q, weights[0], cos, sin, heads),
            rotated(x_k, weights[1], cos, sin, heads),
            x_v.unflatten(-1, (heads, -1)),
        ),
        strict=True,
    ):
        assert got.dtype == dtype
        assert (got.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("part", ["x", "weight", "rows apart"])
def test_pairs_that_would_straddle_words_are_refused(part: str, device) -> None:
    """Two neighbours are read at once; a GPU faults where that is not aligned."""
    width, grid = 64, BlockGrid(16, 16)
    wide = torch.zeros(1, 16, 3 * width + 2, device=device).half()
    x = wide[..., :-2].chunk(3, 2)
    weight = torch.ones(width + 1, device=device).half()
    message = "must begin at a multiple of two numbers"
    if part == "x":
        x = wide[..., 1:-1].chunk(3, 2)
    elif part == "rows apart":
        x = torch.zeros(1, 16, 3 * width + 1, device=device).half()[..., :-1].chunk(3, 2)
        message = "must be an even number of numbers apart, got 193"
    weight = weight[1:] if part == "weight" else weight[:-1]
    angles = torch.ones(16, 16, device=device)
    keys = torch.zeros(1, 1, 16, 2, 32, device=device).half()
    slots = torch.zeros(1, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=message):
        project_blocks_triton(
            *x, weight, weight, EPS, angles, angles, keys, keys.clone(), None, slots,
            q_grid=grid, kv_grid=grid,
        )  # fmt: skip
