"""Whoever runs the blocks, the forward is the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightforcing.lightforcing_core.attention import dense_attention
from lightforcing.lightforcing_core.wan.compiled import compiled_block_runner
from lightforcing.lightforcing_core.wan.config import WanConfig
from lightforcing.lightforcing_core.wan.forward import (
    RunBlocks,
    prepare_text,
    run_each_block,
    wan_forward,
)
from lightforcing.lightforcing_core.wan.modules import WanModel


def velocity(tree: WanModel, runner: RunBlocks | None, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(2)
    dtype = tree.patch_embedding.weight.dtype
    x = torch.randn(1, 16, 3, 8, 8, generator=generator).to(device, dtype)
    text = torch.randn(1, 5, 16, generator=generator).to(device, dtype)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense_attention(q, k, v)

    with torch.no_grad():
        return wan_forward(
            tree,
            x,
            torch.tensor([[900.0, 500.0, 0.0]], device=device),
            range(3),
            prepare_text(tree, text),
            attend,
            run_blocks=runner,
        )


def small_tree() -> WanModel:
    torch.manual_seed(1)
    config = WanConfig(dim=256, ffn_dim=128, num_heads=2, num_layers=3, text_dim=16)
    return WanModel(config).requires_grad_(False)


def test_a_runner_gets_the_blocks_in_order_and_decides_their_result() -> None:
    tree = small_tree()
    seen = []

    def runner(blocks, hidden, *rest):
        seen.extend(blocks)
        return run_each_block(blocks, hidden, *rest) + 1.0

    changed = velocity(tree, runner)
    assert seen == list(tree.blocks)
    assert not torch.equal(changed, velocity(tree, None))
    assert torch.equal(velocity(tree, run_each_block), velocity(tree, None))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_blocks_compute_the_same_with_one_graph_for_all_layers() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    tree = small_tree().cuda()
    torch._dynamo.utils.counters.clear()
    runner = compiled_block_runner()
    expected = velocity(tree, None, "cuda")
    got = velocity(tree, runner, "cuda")
    assert (got - expected).norm() / expected.norm() < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    half = small_tree().cuda().bfloat16()
    rounded = velocity(half, compiled_block_runner(), "cuda")
    assert (rounded - expected).norm() / expected.norm() < 0.02
