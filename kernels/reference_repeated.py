"""Attention to keys of which the last ones are all alike; the twin of `triton_repeated`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import check_repeated


def attend_repeated(q: Tensor, k: Tensor, v: Tensor, distinct: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, where many rows of k and v are one row over and over.

    A row that is there n times weighs as much as one whose score is log(n) higher, so only the
    rows that differ are read. Padding of a prompt is such a row.

    Args:
        q: [B, Sq, H, D].
        k, v: [B, Sk, H, D]; from row distinct - 1 on all rows are alike.
        distinct: int32 [1], 1..Sk, on the device: another number launches the same.

    Returns:
        [B, Sq, H, D] in q's type, computed in float32.

    Raises:
        ValueError: shapes or types that do not fit each other.
    """
    check_repeated(q, k, v, distinct)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    number = int(distinct)
    alike = k.shape[1] - number + 1
    k, v = k[:, :number].to(wide), v[:, :number].to(wide)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), k) / math.sqrt(q.shape[3])
    scores[..., -1] += math.log(alike)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).to(q.dtype)
