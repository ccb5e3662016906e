"""Attention to keys of which the last ones are alike is attention to all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightforcing.kernels.reference_repeated import attend_repeated
from lightforcing.kernels.triton_repeated import attend_repeated_triton

IMPLEMENTATIONS = pytest.mark.parametrize(
    "attend", [attend_repeated, attend_repeated_triton], ids=["reference", "triton"]
)


def all_of_them(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain attention in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT / q.shape[3] ** 0.5).softmax(-1) @ v).transpose(1, 2)


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("distinct", "keys"), [(1, 1), (1, 70), (5, 70), (64, 70), (65, 130), (70, 70), (130, 512)]
)
@pytest.mark.parametrize("queries", [1, 63, 130])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_is_attention_to_all(
    attend, distinct: int, keys: int, queries: int, head_dim: int, dtype: torch.dtype, device
) -> None:
    batch, heads = 2, 2
    q = torch.randn(batch, queries, heads, head_dim, device=device).to(dtype)
    k, v = (torch.randn(batch, keys, heads, head_dim, device=device).to(dtype) for _ in "kv")
    for x in (k, v):
        x[:, distinct:] = x[:, distinct - 1 : distinct]
    expected = all_of_them(q, k, v)
    k[:, distinct:] = v[:, distinct:] = float("nan")  # never read
    number = torch.tensor([distinct], dtype=torch.int32, device=device)
    got = attend(q, k, v, number)
    assert got.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    assert (got.double() - expected).abs().max() <= tolerance * expected.abs().max()


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (1, 4, 2, 32)}, "agree in B, H and D"),
        ({"v": (1, 5, 2, 64)}, "v must have k's shape"),
        ({"distinct": (2,)}, "distinct must be int32 .1."),
    ],
)
def test_shapes_that_do_not_fit_are_refused(attend, change: dict, message: str, device) -> None:
    shapes = {"q": (1, 3, 2, 64), "k": (1, 4, 2, 64), "v": (1, 4, 2, 64), "distinct": (1,)} | change
    q, k, v = (torch.zeros(shapes[name], device=device).half() for name in "qkv")
    distinct = torch.ones(shapes["distinct"], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, distinct)
