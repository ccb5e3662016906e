"""Attention whose changing numbers lie on the device, so that a graph can hold a forward.

From chunk to chunk change: the slots of the open frames, which slots may be chosen from, and how
many blocks to keep. They lie in small tensors at fixed addresses, filled when a chunk begins;
kernels see the whole cache, in which slots without a frame are absent. So every chunk's forward is
the same launches with the same arguments, and `ForwardEngine` may record it once.

What surrounds attention is fused here too: norm, rotary, cache write and block means are one
launch (`kernels.reference.project_blocks`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ...kernels.eight_bit import Scaling
from ...kernels.grid import BlockGrid
from ..attention import dense_attention
from ..backends import AttentionBackend
from ..kv_cache import KVCache
from ..schedule import Timeline
from ..sparse import SparseAttention, _Prepared, on_host
from ..sparse_settings import SparseSettings
from ..stopwatch import Stopwatch
from ..wan.forward import PositionTable
from .dense_attention import GraphKey, OpenSlots, projection_arguments


class FastSparseAttention(SparseAttention):
    """`SparseAttention` that takes projections instead of rotated queries and keys.

    A pass whose layers share one budget and choose by score goes through fixed addresses, and so
    does a dense one; every other (fixed windows, budgets that differ by layer) is computed as in
    `SparseAttention`.
    """

    def __init__(
        self,
        cache: KVCache,
        settings: SparseSettings,
        timeline: Timeline,
        backend: AttentionBackend,
        products: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            products: type of the projections that will be given with a scaling, for the warm-up;
                None: they come as they are.
        """
        super().__init__(cache, settings, timeline, backend)
        self._products = products
        spec = cache.spec
        self._roles = torch.zeros(spec.capacity_frames, dtype=torch.int32, device=self._device)
        self._limits = torch.zeros(2, dtype=torch.int32, device=self._device)
        self._open = OpenSlots(self._device)
        self._own: Tensor | None = None
        self._lists: list[tuple[Tensor, Tensor]] = []  # of each layer, [B, H, query blocks, width]
        self._generation = 0  # of the addresses
        self._is_static = self._is_dense = False
        self._is_block_attention_ready = False  # compiled before the first chunk
        self._every: tuple[Tensor, Tensor] | None = None
        self._every_by_length: dict[int, tuple[Tensor, Tensor]] = {}
        self._planned: set[int] = set()  # layers whose lists are this chunk's
        self._is_recorded = False

    def restart(self, settings: SparseSettings, timeline: Timeline) -> None:
        """Another video over the same cache, which has been emptied; addresses stay."""
        self.cache.restart()
        self.settings, self._timeline, self._off = settings, timeline, False
        self._watch = Stopwatch(self._device)  # a cancelled video's times are not this one's
        self._is_static = self._is_dense = self._is_recorded = False
        self._planned.clear()

    def _launch_all(self, own_block_variants: set[bool] | None) -> None:
        """The fused kernels too; leaves zeros in the first slot, which holds nothing yet."""
        super()._launch_all(own_block_variants)
        self._is_block_attention_ready = own_block_variants is not None
        cache, spec = self.cache, self.cache.spec
        q_grid = BlockGrid(spec.frame_tokens, self._query_block_tokens)
        width = spec.num_heads * spec.head_dim
        x = torch.zeros(
            (spec.batch, spec.frame_tokens, 3 * width),
            dtype=self._products or spec.dtype,
            device=self._device,
        )
        weight, scaling = torch.zeros(width, dtype=spec.dtype, device=self._device), None
        if self._products is not None:
            rows = torch.zeros(spec.batch * spec.frame_tokens, 1, device=self._device)
            columns = torch.zeros(1, 3 * width, device=self._device)
            scaling = Scaling(rows, columns, columns[0].to(spec.dtype))
        angles = torch.zeros(spec.frame_tokens, spec.head_dim // 2, device=self._device)
        own = torch.zeros(q_grid.blocks_per_segment, dtype=torch.int32, device=self._device)
        _, pooled_q = self._backend.project_blocks(
            *x.chunk(3, 2),
            weight,
            weight,
            1e-6,
            angles,
            angles,
            cache.keys[0],
            cache.values[0],
            cache.pooled_keys[0],
            own[:1],
            q_grid=q_grid,
            kv_grid=spec.grid,
            scaling=scaling,
        )
        for has_own in own_block_variants or ():
            self._backend.select_blocks(
                pooled_q,
                cache.pooled_keys[0],
                blocks_per_segment=spec.blocks_per_frame,
                roles=self._roles,
                keep_candidates=0,
                top_k=1,
                own_blocks=own if has_own else None,
                limits=self._limits,
            )

    def begin_chunk(self, chunk: int | None) -> None:
        super().begin_chunk(chunk)
        self._planned.clear()
        prepared = list(self._prepared.values())
        self._is_dense = all(one is None for one in prepared)
        self._is_static = (
            len(prepared) == 1 and prepared[0] is not None and prepared[0].fixed is None
        )
        self._open.fill(self.cache.open_slots)
        self._every = self._every_block() if self._is_dense else None
        if self._is_static:
            assert prepared[0] is not None
            self._fill(prepared[0])

    def _fill(self, prepared: _Prepared) -> None:
        """Send a chunk's numbers to their addresses."""
        spec, rule = self.cache.spec, prepared.rule
        rows = spec.batch, spec.num_heads, self._q_grid.blocks_per_segment
        width = rule.top_k
        own = prepared.own_blocks
        fits = bool(self._lists) and self._lists[0][1].shape == rows
        fits = fits and self._lists[0][0].shape[3] >= width
        if not fits or (own is None) != (self._own is None):
            planned = [r.top_k for r in self._rules_to_come() if r is not None]
            width = max([width, *planned])
            self._own = None if own is None else torch.zeros_like(own)

            def empty(*shape: int) -> Tensor:
                return torch.full(shape, -1, dtype=torch.int32, device=self._device)

            self._lists = [(empty(*rows, width), empty(*rows)) for _ in range(spec.num_layers)]
            self._generation += 1
        absent = [0] * (spec.capacity_frames - len(rule.roles))
        self._roles.copy_(on_host([*rule.roles, *absent], self._device), non_blocking=True)
        self._limits.copy_(
            on_host([rule.keep_candidates, rule.top_k], self._device), non_blocking=True
        )
        if own is not None and self._own is not None:
            self._own.copy_(own)

    @property
    def takes_projections(self) -> bool:
        """Whether the open chunk's passes go through fixed addresses: then use `project`."""
        return self._is_static or self._is_dense

    @property
    def is_recordable(self) -> bool:
        """Whether launches are all that a pass does: plain torch asks the device for numbers."""
        return bool(self._backend.attend_variants)

    def graph_key(self) -> GraphKey | None:
        """What the coming pass launches; None: what no other pass does.

        A dense chunk that begins a video sees itself only: its passes are alike too.
        """
        frames = len(self.cache.open_slots)
        if self._is_static:
            chooses = not self._planned or self.settings.plans_anew(self._step)
            return GraphKey(self._generation, frames, 0, chooses, self._own is not None)
        alone = self._is_dense and frames == self.cache.visible_frames
        return GraphKey(0, frames, frames, False, False) if alone else None

    def record(self, recording: bool) -> None:
        """Within a recording nothing is timed and nothing is counted; `replayed` counts."""
        self._is_recorded = recording

    def replayed(self) -> None:
        """A recorded pass has been launched again."""
        layers = range(self.cache.spec.num_layers)
        if self._is_static:
            self._planned.update(layers)
            self._counts += [counts for _, counts in self._lists]
        else:
            self._counts += [None for _ in layers]

    @property
    def plans(self) -> dict[int, tuple[Tensor, Tensor]]:
        static = {layer: self._lists[layer] for layer in sorted(self._planned)}
        return static if self._is_static else super().plans

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
        """Self-attention from the linear layers' results, where `takes_projections`.

        Args:
            x_q, x_k, x_v: [B, S, H * D] of the open chunk.
            module: the block's self-attention, for its two norms.
            positions: of the tokens.
            scaling: of x_q, x_k and x_v together, if they are products of eight-bit numbers.

        Returns:
            [B, S, H, D].
        """
        cache, spec = self.cache, self.cache.spec
        grids = {"q_grid": self._q_grid, "kv_grid": spec.grid, "scaling": scaling}
        arguments = projection_arguments(
            cache, layer, x_q, x_k, x_v, module, positions, self._open.numbers
        )
        if self._is_dense:
            q, _ = self._backend.project_blocks(*arguments, **grids)
            if not self._is_recorded:
                self._counts.append(None)
            with self._span("attend"):
                if self._every is None:
                    return dense_attention(q, *cache.visible(layer))
                return self._attend(layer, q, *self._every)
        assert self._is_static
        with self._span("select"):
            q, pooled_q = self._backend.project_blocks(*arguments, **grids)
            if layer not in self._planned or self.settings.plans_anew(self._step):
                self._backend.select_blocks(
                    pooled_q,
                    cache.pooled_keys[layer],
                    blocks_per_segment=spec.blocks_per_frame,
                    roles=self._roles,
                    keep_candidates=0,
                    top_k=self._lists[layer][0].shape[3],
                    own_blocks=self._own,
                    limits=self._limits,
                    out=self._lists[layer],
                )
        indices, counts = self._lists[layer]
        if not self._is_recorded:
            self._planned.add(layer)
            self._counts.append(counts)
        with self._span("attend"):
            return self._attend(layer, q, indices, counts)

    def _attend(self, layer: int, q: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
        return self._backend.block_sparse_attention(
            q,
            self.cache.keys[layer].flatten(1, 2),
            self.cache.values[layer].flatten(1, 2),
            indices,
            counts,
            q_grid=self._q_grid,
            kv_grid=self.cache.spec.grid,
        )

    def _every_block(self) -> tuple[Tensor, Tensor] | None:
        """Lists of all visible blocks, for a chunk that sees only itself: dense attention without
        copies of keys and values that leave the padding of their slots behind.

        None where there is no padding, or no sparse chunk will follow.
        """
        cache, spec = self.cache, self.cache.spec
        frames = len(cache.open_slots)
        is_padded = spec.frame_stride != spec.frame_tokens
        if not self._is_block_attention_ready or not is_padded or frames != cache.visible_frames:
            return None
        if frames not in self._every_by_length:
            width = frames * spec.blocks_per_frame
            rows = spec.batch, spec.num_heads, self._q_grid.blocks_per_segment
            ids = torch.arange(width, dtype=torch.int32, device=self._device)
            self._every_by_length[frames] = (
                ids.expand(*rows, width).contiguous(),
                torch.full(rows, width, dtype=torch.int32, device=self._device),
            )
        return self._every_by_length[frames]

    def _span(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self._is_recorded else self._watch.span(name)
