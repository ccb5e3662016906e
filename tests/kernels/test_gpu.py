"""What only a GPU can show: real sizes, real types, far addresses. Run with `pytest -m gpu`.

The other tests of this folder run on the GPU too where there is one.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightforcing.kernels import (
    BlockGrid,
    block_sparse_attention,
    check_block_lists,
    pool_blocks,
    select_blocks,
)
from lightforcing.kernels.configs import AttentionConfig, attention_config
from lightforcing.kernels.gluon_attention import block_sparse_attention_gluon
from lightforcing.kernels.ops import (
    block_sparse_attention_triton,
    pool_blocks_triton,
    select_blocks_triton,
)
from lightforcing.kernels.rounds import Rounds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Relative L2 error against float64 of the same inputs.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


def random_lists(heads: int, rows: int, blocks: int, width: int, batch: int = 1) -> Tensor:
    order = torch.rand(batch, heads, rows, blocks, device="cuda").argsort(3)
    return order[..., :width].sort(3).values.int().contiguous()


def relative_error(out: Tensor, expected: Tensor) -> float:
    assert not out.isnan().any()
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


def capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def poisoned_slots(slots: int, grid: BlockGrid, heads: int, head_dim: int, dtype) -> Tensor:
    x = torch.randn(1, slots, grid.slot_tokens, heads, head_dim, device="cuda", dtype=dtype)
    x[:, :, grid.segment_tokens :] = float("nan")
    return x.flatten(1, 2)


@pytest.mark.parametrize("allow_tma", [True, False], ids=["default", "pointers"])
@pytest.mark.parametrize("blocks", [(128, 64), (128, 128), (64, 64), (128, 32), (64, 16)])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("segment", [1536, 1560])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_three_segments_of_queries_and_six_of_keys(
    dtype: torch.dtype, segment: int, head_dim: int, blocks: tuple[int, int], allow_tma: bool
) -> None:
    q_grid, kv_grid = BlockGrid(segment, blocks[0]), BlockGrid(segment, blocks[1])
    q = torch.randn(1, 3 * segment, 2, head_dim, device="cuda", dtype=dtype)
    k, v = (poisoned_slots(6, kv_grid, 2, head_dim, dtype) for _ in "kv")
    rows, total = 3 * q_grid.blocks_per_segment, 6 * kv_grid.blocks_per_segment
    indices = random_lists(2, rows, total, max(2, total // 8))
    counts = torch.randint(
        0, indices.shape[3] + 1, indices.shape[:3], dtype=torch.int32, device="cuda"
    )
    check_block_lists(indices, counts, num_kv_blocks=total)
    config = attention_config(capability(), head_dim, *blocks, allow_tma=allow_tma)
    out = torch.full_like(q, float("nan"))
    block_sparse_attention_triton(
        q, k, v, indices, counts, q_grid=q_grid, kv_grid=kv_grid, out=out, config=config
    )
    expected = block_sparse_attention(
        q.double(), k.double(), v.double(), indices, counts, q_grid=q_grid, kv_grid=kv_grid
    )
    assert relative_error(out, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("kv_block", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("segment", [1536, 1560, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_gluon_kernel(dtype: torch.dtype, segment: int, head_dim: int, kv_block: int) -> None:
    """Counts of 0, 1 and up to more steps than stages; two batches; padding of NaN."""
    if capability() != 90:
        pytest.skip("the Gluon kernel is for compute capability 9.0")
    q_grid, kv_grid = BlockGrid(segment, 128), BlockGrid(segment, kv_block)
    q = torch.randn(2, 3 * segment, 3, head_dim, device="cuda", dtype=dtype)
    k, v = (
        torch.cat([poisoned_slots(6, kv_grid, 3, head_dim, dtype) for _ in range(2)]) for _ in "kv"
    )
    rows, total = 3 * q_grid.blocks_per_segment, 6 * kv_grid.blocks_per_segment
    indices = random_lists(3, rows, total, min(total, 13), batch=2)
    counts = torch.randint(
        0, indices.shape[3] + 1, indices.shape[:3], dtype=torch.int32, device="cuda"
    )
    counts[:, :, 0], counts[:, :, 1] = 0, 1
    lists = {"q_grid": q_grid, "kv_grid": kv_grid}
    expected = block_sparse_attention(q.double(), k.double(), v.double(), indices, counts, **lists)
    for _ in range(3):  # a race shows itself sometimes
        out = torch.full_like(q, float("nan"))
        block_sparse_attention_gluon(q, k, v, indices, counts, out=out, **lists)
        assert relative_error(out, expected) <= TOLERANCE[dtype]
        assert (out[:, : min(128, segment)] == 0).all()


@pytest.mark.parametrize("rounds", [Rounds(0, 8), Rounds(20, 2), Rounds(39, 5), Rounds(42, 1)])
@pytest.mark.parametrize("kv_block", [64, 128])
def test_the_gluon_kernel_with_cut_tiles(kv_block: int, rounds: Rounds) -> None:
    """Parts of lists of 0 to 13 blocks, in up to eight parts; a chunk of 832x480 in one segment."""
    if capability() != 90:
        pytest.skip("the Gluon kernel is for compute capability 9.0")
    q_grid, kv_grid = BlockGrid(860, 128), BlockGrid(1560, kv_block)
    q = torch.randn(2, 860, 3, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (
        torch.cat([poisoned_slots(3, kv_grid, 3, 128, torch.bfloat16) for _ in range(2)])
        for _ in "kv"
    )
    indices = random_lists(3, 7, 3 * kv_grid.blocks_per_segment, 13, batch=2)
    counts = torch.randint(0, 14, indices.shape[:3], dtype=torch.int32, device="cuda")
    counts[:, :, 0], counts[:, :, 1] = 0, 1
    lists = {"q_grid": q_grid, "kv_grid": kv_grid}
    expected = block_sparse_attention(q.double(), k.double(), v.double(), indices, counts, **lists)
    for _ in range(3):
        out = torch.full_like(q, float("nan"))
        block_sparse_attention_gluon(q, k, v, indices, counts, out=out, rounds=rounds, **lists)
        assert relative_error(out, expected) <= TOLERANCE[torch.bfloat16]
        assert (out[:, :128] == 0).all()


@pytest.mark.parametrize("lengths", [(1560, 1560), (4680, 4680), (4608, 32256), (1, 63), (65, 1)])
def test_full_lists_are_dense_attention(lengths: tuple[int, int]) -> None:
    q_grid, kv_grid = BlockGrid(lengths[0], 128), BlockGrid(lengths[1], 64)
    q = torch.randn(1, lengths[0], 2, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (poisoned_slots(1, kv_grid, 2, 128, torch.bfloat16) for _ in "kv")
    blocks = torch.arange(kv_grid.blocks_per_segment, dtype=torch.int32, device="cuda")
    indices = blocks.expand(1, 2, q_grid.blocks_per_segment, -1)
    out = block_sparse_attention_triton(q, k, v, indices, None, q_grid=q_grid, kv_grid=kv_grid)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x[:, : n].float().transpose(1, 2) for x, n in zip(
            (q, k, v), (lengths[0], lengths[1], lengths[1]), strict=True))
    )  # fmt: skip
    assert relative_error(out, dense.transpose(1, 2)) <= TOLERANCE[torch.bfloat16]


def test_the_whole_path_at_the_last_chunks_size() -> None:
    """Pool, select, attend at 4608 queries and 32256 keys; lists agree up to rounding of scores."""
    q_grid, kv_grid = BlockGrid(1536, 128), BlockGrid(1536, 64)
    q = torch.randn(1, 3 * 1536, 12, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (poisoned_slots(21, kv_grid, 12, 128, torch.bfloat16) for _ in "kv")
    pooled_q, pooled_k = (
        pool_blocks_triton(q, q_grid, padded=False), pool_blocks_triton(k, kv_grid, padded=True)
    )  # fmt: skip
    torch.testing.assert_close(pooled_q, pool_blocks(q, q_grid, padded=False), rtol=1e-5, atol=1e-6)
    roles = torch.tensor([1] + [2] * 15 + [1] * 5, dtype=torch.int32, device="cuda")
    rule = {"blocks_per_segment": 24, "roles": roles, "keep_candidates": 3, "top_k": 51}
    indices, counts = select_blocks_triton(pooled_q, pooled_k, **rule)
    check_block_lists(indices, counts, num_kv_blocks=21 * 24)
    expected, _ = select_blocks(pooled_q, pooled_k, **rule)
    differing = (indices != expected).any(3).float().mean().item()
    assert differing < 0.01, f"{differing:.2%} of the lists differ from the reference"
    out = block_sparse_attention_triton(q, k, v, indices, counts, q_grid=q_grid, kv_grid=kv_grid)
    wide = block_sparse_attention(
        q.float(), k.float(), v.float(), indices, counts, q_grid=q_grid, kv_grid=kv_grid
    )
    assert relative_error(out, wide) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("use_tma", [True, False], ids=["descriptors", "pointers"])
def test_addresses_beyond_two_to_the_31(use_tma: bool) -> None:
    """A cache of 2.4e9 elements: its first and its last block, in one list."""
    if use_tma and capability() < 90:
        pytest.skip("descriptors need compute capability 9.0")
    heads, head_dim, grid = 16, 128, BlockGrid(60, 64)
    slots = 1_200_000 // 64
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GiB of free memory")
    cache = torch.zeros(1, slots * 64, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    assert cache.numel() > 2**31
    cache[:, :64].normal_()
    cache[:, -64:].normal_()
    small = torch.cat([cache[:, :64], cache[:, -64:]], 1)
    q = torch.randn(1, 64, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    ids = torch.tensor([0, slots - 1], dtype=torch.int32, device="cuda").expand(1, heads, 1, 2)
    q_grid = BlockGrid(64, 64)
    config = AttentionConfig(64, 64, 4, 2, use_tma)
    out = block_sparse_attention_triton(
        q, cache, cache, ids, None, q_grid=q_grid, kv_grid=grid, config=config
    )
    near = torch.tensor([0, 1], dtype=torch.int32, device="cuda").expand(1, heads, 1, 2)
    expected = block_sparse_attention(
        q.double(), small.double(), small.double(), near, None, q_grid=q_grid, kv_grid=grid
    )
    assert relative_error(out, expected) <= TOLERANCE[torch.bfloat16]
    pooled = pool_blocks_triton(cache, grid, padded=True)
    torch.testing.assert_close(
        pooled[:, :, [0, -1]], pool_blocks(small, grid, padded=True), rtol=1e-4, atol=1e-5
    )


def test_a_growing_cache_compiles_once() -> None:
    from lightforcing.kernels import triton_attention, triton_pooling, triton_selection

    jitted = (
        triton_attention.block_sparse_attention_kernel,
        triton_pooling.pool_blocks_kernel,
        triton_selection.block_scores_kernel,
        triton_selection.select_blocks_kernel,
    )

    def compiled() -> list[int]:
        return [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in jitted]

    grid = BlockGrid(100, 64)
    cache = torch.randn(1, 21 * 128, 3, 128, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(1, 300, 3, 128, device="cuda", dtype=torch.bfloat16)
    counts = []
    for slots in range(1, 22):
        k = cache[:, : slots * 128]
        pooled_q = pool_blocks_triton(q, grid, padded=False)
        pooled_k = pool_blocks_triton(k, grid, padded=True)
        roles = torch.ones(slots, dtype=torch.int32, device="cuda")
        indices, kept = select_blocks_triton(
            pooled_q, pooled_k, blocks_per_segment=2, roles=roles, keep_candidates=0, top_k=slots
        )
        block_sparse_attention_triton(q, k, k, indices, kept, q_grid=grid, kv_grid=grid)
        counts.append(compiled())
    assert counts[0] == counts[-1]


def test_a_chunk_can_be_a_cuda_graph() -> None:
    """Nothing waits for the device or copies from the host once roles are a tensor."""
    grid = BlockGrid(100, 64)
    q = torch.randn(1, 300, 3, 128, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, 6 * 128, 3, 128, device="cuda", dtype=torch.bfloat16)
    roles = torch.ones(6, dtype=torch.int32, device="cuda")

    def whole() -> Tensor:
        indices, kept = select_blocks_triton(
            pool_blocks_triton(q, grid, padded=False),
            pool_blocks_triton(k, grid, padded=True),
            blocks_per_segment=2,
            roles=roles,
            keep_candidates=0,
            top_k=5,
        )
        return block_sparse_attention_triton(q, k, k, indices, kept, q_grid=grid, kv_grid=grid)

    expected = whole()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        whole()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = whole()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)
