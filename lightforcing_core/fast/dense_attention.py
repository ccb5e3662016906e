"""Dense attention for a graph, and what it shares with the sparse one (`attention`)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...kernels.eight_bit import Scaling
from ...kernels.grid import BlockGrid
from ..attention import CachedAttention, dense_attention
from ..kv_cache import KVCache
from ..sparse import on_host
from ..stopwatch import Stopwatch
from ..wan.forward import PositionTable
from .operations import fused_operations


class GraphKey(NamedTuple):
    """What two passes have in common that launch the same.

    Attributes:
        generation: of the addresses; 0 for a dense first chunk.
        frames: of the chunk.
        visible_frames: that a dense pass sees; 0 for a sparse one, which is launched alike
            whatever it sees.
        chooses: whether the pass chooses blocks.
        has_own: whether each query block's own block is guaranteed.
    """

    generation: int
    frames: int
    visible_frames: int
    chooses: bool
    has_own: bool


class OpenSlots:
    """Where the open chunk's frames go, on the device; chunks of one length share an address."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._by_length: dict[int, Tensor] = {}
        self.numbers = torch.zeros(0, dtype=torch.int32, device=device)

    def fill(self, slots: Sequence[int]) -> None:
        if len(slots) not in self._by_length:
            empty = torch.zeros(len(slots), dtype=torch.int32, device=self._device)
            self._by_length[len(slots)] = empty
        self.numbers = self._by_length[len(slots)]
        self.numbers.copy_(on_host(slots, self._device), non_blocking=True)


class FastDenseAttention(CachedAttention):
    """`CachedAttention` that takes projections: norm, rotary and cache write are one launch."""

    takes_projections = True

    def __init__(self, cache: KVCache, device: torch.device) -> None:
        super().__init__(cache, Stopwatch(device))
        self._is_recorded = False
        self._open = OpenSlots(device)
        self._project = fused_operations(device).project_blocks

    def begin_chunk(self, chunk: int | None) -> None:
        self._open.fill(self.cache.open_slots)

    def restart(self) -> None:
        """Another video over the same cache."""
        self.cache.restart()
        self._is_recorded = False
        assert self._watch is not None
        self._watch.take()

    def project(
        self,
        layer: int,
        x_q: Tensor,
        x_k: Tensor,
        x_v: Tensor,
        module: nn.Module,
        positions: PositionTable,
        scaling: Scaling | None = None,
    ) -> Tensor:
        """As `attention.FastSparseAttention.project`."""
        assert self._watch is not None
        cache, grid = self.cache, BlockGrid(x_q.shape[1], x_q.shape[1])
        arguments = projection_arguments(
            cache, layer, x_q, x_k, x_v, module, positions, self._open.numbers
        )
        q, _ = self._project(*arguments, q_grid=grid, kv_grid=cache.spec.grid, scaling=scaling)
        with nullcontext() if self._is_recorded else self._watch.span("attend"):
            return dense_attention(q, *cache.visible(layer))

    @property
    def is_recordable(self) -> bool:
        """As `attention.FastSparseAttention.is_recordable`."""
        return True

    def graph_key(self) -> GraphKey:
        """What the coming pass launches: all passes of a chunk are alike."""
        return GraphKey(0, len(self.cache.open_slots), self.cache.visible_frames, False, False)

    def record(self, recording: bool) -> None:
        """Within a recording nothing is timed."""
        self._is_recorded = recording

    def replayed(self) -> None:
        """A recorded pass has been launched again."""


def projection_arguments(
    cache: KVCache,
    layer: int,
    x_q: Tensor,
    x_k: Tensor,
    x_v: Tensor,
    module: nn.Module,
    positions: PositionTable,
    open_slots: Tensor,
) -> tuple[Any, ...]:
    """Of `project_blocks`, its grids apart."""
    return (
        x_q,
        x_k,
        x_v,
        module.norm_q.weight,
        module.norm_k.weight,
        module.norm_q.eps,
        positions.cos,
        positions.sin,
        cache.keys[layer],
        cache.values[layer],
        cache.pooled_keys[layer] if cache.pooled_keys else None,
        open_slots,
    )
