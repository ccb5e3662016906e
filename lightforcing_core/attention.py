"""Self-attention of the denoiser over the key/value cache.

`ChunkAttention` is what a rollout drives and `wan_forward` calls per layer: it writes the chunk's
keys and values into the cache and attends to what is visible. Here it is dense; `sparse` has the
other one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

from .kv_cache import KVCache
from .stopwatch import Stopwatch


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v without a mask; q [B, Sq, H, D], k and v [B, Sk, H, D]."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


@dataclass(frozen=True)
class AttentionStatistics:
    """What the self-attention of a chunk did.

    Attributes:
        sparsity: share of (query block, key block) pairs asked to be skipped, 0..1.
        density: share of pairs computed, 0..1, mean over heads, layers and the chunk's own
            passes so far.
        select_seconds, attend_seconds: in choosing blocks and in attending, in all passes since
            they were last asked for. Device time on CUDA, wall time on the CPU.
    """

    sparsity: float
    density: float
    select_seconds: float
    attend_seconds: float


class ChunkAttention(Protocol):
    """Self-attention of a rollout.

    Order of calls: per chunk, once its frames have entered the cache, `begin_chunk`; per forward
    `begin_pass`, then one call for every layer; `tally` after the denoising passes.
    """

    def begin_chunk(self, chunk: int | None) -> None:
        """Chunk index from 0; None for given frames, which are written and not generated."""

    def begin_pass(self, step: int | None) -> None:
        """Denoising step from 0; None for the clean pass."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v of the open chunk, [B, S, H, D], q and k rotated; returns [B, S, H, D]."""

    def tally(self) -> Callable[[], AttentionStatistics]:
        """What the open chunk's passes so far did. Only reading it, by the call of what is
        returned, waits for the device, and not for passes that come after this one."""


class CachedAttention:
    """Dense attention of one chunk to the past frames in the cache and to itself.

    Args: watch, to have the time of attending; without one it is given as 0.
    """

    def __init__(self, cache: KVCache, watch: Stopwatch | None = None) -> None:
        self.cache = cache
        self._watch = watch

    def begin_chunk(self, chunk: int | None) -> None:
        pass

    def begin_pass(self, step: int | None) -> None:
        pass

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v of the open chunk, [B, S, H, D], q and k rotated; returns [B, S, H, D]."""
        self.cache.write(layer, k, v)
        with self._watch.span("attend") if self._watch else contextlib.nullcontext():
            return dense_attention(q, *self.cache.visible(layer))

    def tally(self) -> Callable[[], AttentionStatistics]:
        taken = self._watch.close() if self._watch else dict
        return lambda: AttentionStatistics(0.0, 1.0, 0.0, taken().get("attend", 0.0))
