"""Coupling, attention of teacher forcing, and the optimizer, each against a plain statement."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lightforcing.training.block_causal import block_causal_attention, block_causal_mask
from lightforcing.training.common import learning_rate
from lightforcing.training.coupling import imprint, project
from lightforcing.training.optimizer import MasterOptimizer, orthogonalise


def test_imprinted_noise_stands_for_the_placement_and_is_standard_normal() -> None:
    noise, placement = torch.randn(400, 16, 3, 16, 32), torch.randn(400, 8)
    tied = imprint(noise, placement)
    torch.testing.assert_close(project(tied, 8), placement, atol=1e-4, rtol=0)
    assert tied.mean().abs() < 1e-3
    assert tied[:, :8].std() == pytest.approx(1.0, abs=2e-3)
    assert torch.equal(tied[:, 8:], noise[:, 8:])
    unused = project(noise, 16)[:, 8:]
    torch.testing.assert_close(project(tied, 16)[:, 8:], unused, atol=1e-4, rtol=0)


def _visible(length: int, chunk: int) -> torch.Tensor:
    half = length // 2
    index = torch.arange(length)
    noisy, own = index >= half, (index % half) // chunk
    past = ~noisy[None] & (own[None] < own[:, None])
    return past | ((noisy[None] == noisy[:, None]) & (own[None] == own[:, None]))


def test_block_causal_attention_is_masked_attention() -> None:
    chunk, length = 6, 36
    q, k, v = (torch.randn(2, length, 2, 8, requires_grad=True) for _ in range(3))
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*heads_first, attn_mask=_visible(length, chunk))
    result = block_causal_attention(q, k, v, chunk)
    torch.testing.assert_close(result, expected.transpose(1, 2), atol=1e-5, rtol=1e-5)
    grad = torch.randn_like(result)
    for ours, theirs in zip(
        torch.autograd.grad(result, (q, k, v), grad),
        torch.autograd.grad(expected.transpose(1, 2), (q, k, v), grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_flex_mask_sees_the_same() -> None:
    chunk, length = 384, 2304
    mask = block_causal_mask(length, chunk, torch.device("cpu"))
    tiles = _visible(length, chunk)[::128, ::128]
    assert torch.equal(mask.to_dense()[0, 0].bool(), tiles)
    assert mask.kv_num_blocks.sum() == 0, "tiles are whole: none needs a mask inside"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_flex_attention_agrees_on_the_gpu() -> None:
    from lightforcing.training.block_causal import flex_block_causal_attention

    chunk, length = 384, 2304
    q, k, v = (torch.randn(1, length, 2, 128, device="cuda").bfloat16() for _ in range(3))
    mask = block_causal_mask(length, chunk, q.device)
    result = torch.compile(flex_block_causal_attention)(q, k, v, mask)
    expected = block_causal_attention(q, k, v, chunk)
    assert (result - expected).float().norm() < 1e-2 * expected.float().norm()


def test_orthogonalise_brings_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 12, 40)))
    assert values.min() > 0.4 and values.max() < 1.4


@pytest.mark.parametrize("muon", [True, False])
def test_the_optimizer_learns_a_linear_map(muon: bool) -> None:
    layer = torch.nn.Linear(8, 8)
    target = torch.randn(8, 8)
    optimizer = MasterOptimizer(layer, use_muon=lambda _, p: muon and p.ndim == 2)

    def loss() -> torch.Tensor:
        x = torch.randn(64, 8)
        return (layer(x) - x @ target).square().mean()

    before = loss().item()
    for step in range(150):
        loss().backward()
        optimizer.step(learning_rate(0.1, step / 150))
    assert loss().item() < 0.1 * before
    assert set(optimizer.averaged()) == {"weight", "bias"}
