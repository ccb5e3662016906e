"""Self-attention of the denoiser over the key/value cache.

`CachedAttention` is what `wan_forward` calls per layer: it writes the chunk's keys and values
into the cache and attends to all that is visible. Here attention is dense.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .kv_cache import KVCache


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v without a mask; q [B, Sq, H, D], k and v [B, Sk, H, D]."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


class CachedAttention:
    """Dense attention of one chunk to the past frames in the cache and to itself."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v of the open chunk, [B, S, H, D], q and k rotated; returns [B, S, H, D]."""
        self.cache.write(layer, k, v)
        return dense_attention(q, *self.cache.visible(layer))
