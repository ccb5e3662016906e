"""Tokens in compact tiles: the same video where attention is dense, compact blocks where not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightforcing.lightforcing_core.attention import dense_attention
from lightforcing.lightforcing_core.backends import REFERENCE
from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.kv_cache import CacheSpec, KVCache
from lightforcing.lightforcing_core.layout import tile_order
from lightforcing.lightforcing_core.noise import SeededNoise
from lightforcing.lightforcing_core.rollout import Chunk, RolloutSettings, rollout
from lightforcing.lightforcing_core.schedule import Timeline, UniformSparsity
from lightforcing.lightforcing_core.selection import BlockTopK, Hierarchical, SlidingWindow
from lightforcing.lightforcing_core.sparse import SparseAttention
from lightforcing.lightforcing_core.sparse_settings import SparseSettings
from lightforcing.lightforcing_core.wan.config import WanConfig
from lightforcing.lightforcing_core.wan.forward import (
    TextContext,
    position_table,
    prepare_text,
    wan_forward,
)
from lightforcing.lightforcing_core.wan.modules import WanModel

ROWS, COLUMNS, BLOCK = 5, 7, 4  # bands of 2, 2 and 1 rows; the last of nine blocks has 3 tokens
TILES = SparseSettings(
    UniformSparsity(0.7), BlockTopK(), BLOCK, BLOCK, "tiles", backend="reference"
)


def box(tokens: tuple[int, ...], columns: int) -> tuple[int, int]:
    """Rows and columns that some tokens reach over."""
    rows, across = {t // columns for t in tokens}, {t % columns for t in tokens}
    return max(rows) - min(rows) + 1, max(across) - min(across) + 1


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 200))
def test_every_token_has_one_place_and_every_block_is_compact(
    rows: int, columns: int, block: int
) -> None:
    order = tile_order(rows, columns, block)
    assert sorted(order) == list(range(rows * columns))
    bands = max(round(rows / math.sqrt(block)), 1)
    least, most = rows // bands, -(-rows // bands)
    assert most <= 1.5 * math.sqrt(block) + 1
    if columns * least < block:
        return  # a picture so narrow that a block takes several bands
    for start in range(0, len(order), block):
        reach = box(order[start : start + block], columns)
        assert reach[0] <= 2 * most
        assert reach[1] <= block / least + 2


def test_frames_of_768x512_are_squares() -> None:
    order = tile_order(32, 48, 64)
    blocks = {box(order[start : start + 64], 48) for start in range(0, 1536, 64)}
    assert blocks == {(8, 8)}


def test_frames_of_832x480_stay_compact() -> None:
    """Against strips of two rows of 52."""
    order = tile_order(30, 52, 64)
    reach = [box(order[start : start + 64], 52) for start in range(0, 1560, 64)]
    assert max(h + w for h, w in reach) <= 22
    assert sum(h + w for h, w in reach) / 25 <= 19


def test_counts_below_one_are_refused() -> None:
    with pytest.raises(UserError, match="block tokens must be at least 1"):
        tile_order(3, 3, 0)


@pytest.fixture(scope="module")
def tree() -> WanModel:
    torch.manual_seed(0)
    config = WanConfig(
        dim=32, ffn_dim=32, num_heads=2, num_layers=2, text_dim=8, text_len=6, freq_dim=16
    )
    tree = WanModel(config).requires_grad_(False)
    for parameter in tree.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return tree


@pytest.fixture(scope="module")
def text(tree: WanModel) -> TextContext:
    return prepare_text(tree, torch.randn(1, 4, 8))


def test_the_forward_hands_attention_the_order_and_undoes_it(
    tree: WanModel, text: TextContext
) -> None:
    """Queries, keys and values are those of the raster, moved; the velocity is the same."""
    x, times = torch.randn(1, 16, 3, 2 * ROWS, 2 * COLUMNS), torch.full((1, 3), 700.0)
    order = tile_order(ROWS, COLUMNS, BLOCK)
    seen: dict[bool, list[Tensor]] = {False: [], True: []}

    def forward(tiles: bool) -> Tensor:
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seen[tiles].extend((q, k, v))
            return dense_attention(q, k, v)

        positions = position_table(
            tree, range(4, 7), *x.shape[3:], x.device, order if tiles else None
        )
        return wan_forward(tree, x, times, range(4, 7), text, attend, positions)

    torch.testing.assert_close(forward(True), forward(False), rtol=1e-5, atol=1e-5)
    for raster, tiles in zip(seen[False], seen[True], strict=True):
        moved = raster.unflatten(1, (3, -1))[:, :, list(order)].flatten(1, 2)
        torch.testing.assert_close(tiles, moved, rtol=1e-5, atol=1e-5)


def test_an_order_that_is_none_is_refused(tree: WanModel) -> None:
    with pytest.raises(ValueError, match=r"each of 0\.\.34 once, got 34 numbers"):
        position_table(tree, [0], 2 * ROWS, 2 * COLUMNS, torch.device("cpu"), range(34))


def test_sparse_attention_is_its_definition_over_tiles() -> None:
    """Block by block over sets of places in the picture, in float64."""
    tokens, heads, dim = ROWS * COLUMNS, 2, 8
    order = torch.tensor(tile_order(ROWS, COLUMNS, BLOCK))
    cache = KVCache(CacheSpec(1, 1, heads, dim, tokens, 4, 0, BLOCK, torch.float32), "cpu")
    attention = SparseAttention(cache, TILES, Timeline((2, 2)), REFERENCE)
    raster = []
    for chunk in range(2):
        cache.enter(range(2 * chunk, 2 * chunk + 2))
        attention.begin_chunk(chunk)
        attention.begin_pass(0)
        qkv = torch.randn(3, 1, 2, tokens, heads, dim)
        raster.append(qkv)
        out = attention(0, *qkv[:, :, :, order].flatten(2, 3))
        if chunk == 0:
            cache.commit()
    q, k, v = torch.cat(raster, 2)[:, 0].double()  # [frames, tokens, H, D]
    blocks = order.split(BLOCK)
    keep = int(0.3 * 4 * len(blocks))
    expected = torch.empty(2, tokens, heads, dim, dtype=torch.float64)
    queries = torch.arange(2 * tokens).split(BLOCK)  # they run over the border of the two frames
    for head in range(heads):
        means = {
            (f, b): k[f, block, head].mean(0) for f in range(4) for b, block in enumerate(blocks)
        }
        for places in queries:
            frames, at = places // tokens, order[places % tokens]
            some = q[2:][frames, at, head]
            best = sorted(means, key=lambda key: -float(some.mean(0) @ means[key]))[:keep]
            keys, values = (torch.cat([x[f, blocks[b], head] for f, b in best]) for x in (k, v))
            weights = (some @ keys.T / math.sqrt(dim)).softmax(-1)
            expected[frames, at, head] = weights @ values
    got = torch.empty(2, tokens, heads, dim)
    got[:, order] = out[0].unflatten(0, (2, tokens))
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def run(
    tree: WanModel,
    text: TextContext,
    sparse: SparseSettings | None,
    given_latents: Tensor | None = None,
    **changes: object,
) -> list[Chunk]:
    settings = RolloutSettings(
        **{"num_frames": 8, "steps": (1000.0, 600.0), "sparse": sparse, **changes}
    )
    noise = SeededNoise(0, (1, 16, 2 * ROWS, 2 * COLUMNS))
    return list(rollout(tree, settings, text, noise, given_latents=given_latents))


def difference(a: list[Chunk], b: list[Chunk]) -> list[float]:
    return [
        float((x.latents - y.latents).norm() / y.latents.norm()) for x, y in zip(a, b, strict=True)
    ]


GEOMETRIES = {
    "short last chunk": {},
    "ring with sink": {"num_frames": 14, "window_frames": 7, "sink_frames": 1},
    "after given frames": {"given_latents": torch.randn(1, 16, 4, 2 * ROWS, 2 * COLUMNS)},
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_dense_chunks_are_those_of_the_raster(
    tree: WanModel, text: TextContext, geometry: dict
) -> None:
    """Those that go around the block lists, and full lists."""
    dense = run(tree, text, None, **geometry)
    for settings in (
        replace(TILES, schedule=UniformSparsity(0.0)),
        replace(TILES, policy=SlidingWindow(0, 99)),
    ):
        assert max(difference(run(tree, text, settings, **geometry), dense)) < 1e-4


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_sparse_chunks_keep_as_much_and_something_else(
    tree: WanModel, text: TextContext, geometry: dict
) -> None:
    policy = Hierarchical(3, 1, 1, guarantee_own_block=True)
    tiles = run(tree, text, replace(TILES, policy=policy), **geometry)
    raster = run(tree, text, replace(TILES, policy=policy, token_order="raster"), **geometry)
    densities = [[c.statistics.density for c in chunks] for chunks in (tiles, raster)]
    assert densities[0] == densities[1] and min(densities[0]) < 0.5
    assert difference(tiles, raster)[-1] > 1e-3


def test_the_order_holds_for_a_run(tree: WanModel, text: TextContext) -> None:
    chunks = rollout(
        tree,
        RolloutSettings(num_frames=6, steps=(1000.0,), sparse=TILES),
        text,
        SeededNoise(0, (1, 16, 2 * ROWS, 2 * COLUMNS)),
        sparse_for_chunk=lambda chunk: replace(TILES, token_order="raster") if chunk else TILES,
    )
    next(chunks)
    with pytest.raises(UserError, match=r"token order.*start a new run"):
        next(chunks)


def test_unknown_orders_are_refused() -> None:
    with pytest.raises(UserError, match="no token order 'cubes'; choose one of raster, tiles"):
        replace(TILES, token_order="cubes")
