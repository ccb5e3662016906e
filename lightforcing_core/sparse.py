"""Sparse self-attention of a rollout: schedule -> selection -> kernels, chunk by chunk.

The host knows by plain integers which frame lies in which slot and how many blocks to keep, so
that within a chunk nothing waits for the device; all that is sent to it is sent as the chunk
begins. Index lists hold physical block ids (slot x blocks per frame + block), so a ring of slots
needs no reordering.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.grid import BlockGrid
from .attention import AttentionStatistics, dense_attention
from .backends import AttentionBackend, AttentionJob, resolve_backend
from .errors import UserError
from .kv_cache import CacheSpec, KVCache
from .schedule import Timeline
from .selection import KeyView, SelectionRule, fixed_blocks, own_blocks
from .sparse_settings import SparseSettings
from .stopwatch import Stopwatch
from .warm_up import launch_all

log = logging.getLogger("lightforcing")


def on_host(numbers: Sequence[int], device: torch.device) -> Tensor:
    """int32, in memory that a copy to the device need not wait for."""
    x = torch.tensor(list(numbers), dtype=torch.int32)
    return x.pin_memory() if device.type == "cuda" else x


@dataclass(frozen=True)
class _Prepared:
    """A rule as the device needs it: made when a chunk begins."""

    rule: SelectionRule
    roles: Tensor  # int32 [visible slots]
    own_blocks: Tensor | None  # int32 [query blocks]
    fixed: Tensor | None  # int32 [blocks], the whole list of a rule that needs no scores


@dataclass(frozen=True)
class _Plan:
    """The index lists of one layer, and what they were made from."""

    prepared: _Prepared
    kv_indices: Tensor  # int32 [B, H, query blocks, top_k]
    kv_counts: Tensor  # int32 [B, H, query blocks]


def sparse_backend(
    settings: SparseSettings, spec: CacheSpec, device: torch.device
) -> AttentionBackend:
    """The backend that can do a run of these settings. See `resolve_backend`."""
    job = AttentionJob(
        device=device,
        dtype=spec.dtype,
        head_dim=spec.head_dim,
        query_block_tokens=settings.query_block(spec.frame_tokens),
        key_block_tokens=settings.key_block(spec.frame_tokens),
        query_block_is_free=settings.query_block_tokens is None,
        qk_precision=settings.qk_precision,
    )
    return resolve_backend(settings.backend, job)


class SparseAttention:
    """Attention of a chunk to the blocks that a policy chooses; see `attention.ChunkAttention`.

    A chunk or pass of sparsity 0 goes through dense attention, exactly as without any of this;
    so does what is given (a start picture, a video to extend): its few clean passes are made once
    and every chunk builds on them.
    """

    def __init__(
        self,
        cache: KVCache,
        settings: SparseSettings,
        timeline: Timeline,
        backend: AttentionBackend,
    ) -> None:
        """
        Args:
            cache: with blocks of the settings' key block size, and keys of eight bits if they ask
                for them.
            timeline: the chunks to come; more may come.
            backend: from `sparse_backend`.

        Raises:
            UserError: the cache is another.
        """
        frame_tokens = cache.spec.frame_tokens
        if cache.spec.block_tokens != settings.key_block(frame_tokens):
            raise UserError(
                f"the cache has key blocks of {cache.spec.block_tokens} tokens, sparse attention "
                f"was set to {settings.key_block(frame_tokens)}; start a new run to change them"
            )
        if cache.spec.int8_keys != (settings.qk_precision == "int8"):
            raise UserError(
                f"the cache has {'' if cache.spec.int8_keys else 'no '}keys of eight bits, sparse "
                f"attention was set to {settings.qk_precision} products; start a new run"
            )
        self.cache = cache
        self.settings = settings
        self._timeline = timeline
        self._backend = backend
        self._query_block_tokens = (
            settings.query_block_tokens
            or backend.query_block_tokens
            or settings.query_block(frame_tokens)
        )
        self._q_grid = self._query_grid()
        self._device = cache.keys[0].device
        self._watch = Stopwatch(self._device)
        self._sparsity = 0.0
        self._off = False
        self._step: int | None = None
        self._prepared: dict[float, _Prepared | None] = {}
        self._plans: dict[int, _Plan] = {}
        self._counts: list[Tensor | None] = []  # kv_counts of each layer and pass; None: dense

    @property
    def query_grid(self) -> BlockGrid:
        """How the open chunk's queries are cut into blocks: one segment, the chunk."""
        return self._q_grid

    @property
    def plans(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Latest (kv_indices, kv_counts) by layer, of the open chunk; none for a dense one."""
        return {layer: (plan.kv_indices, plan.kv_counts) for layer, plan in self._plans.items()}

    def change(self, settings: SparseSettings | None) -> None:
        """Other settings from the next chunk on; None: dense chunks until the next change.

        Raises:
            UserError: other block sizes, another token order or backend, which hold for a whole
                run.
        """
        if settings is not None:
            self.settings.check_change(settings)
            self.settings = settings
        self._off = settings is None

    def warm_up(self, *, settings_may_change: bool = False) -> None:
        """Compile what the run's sparse chunks will need, before the first chunk enters the cache.

        Does nothing where nothing is compiled: in plain torch, and for a single dense chunk.

        Args:
            settings_may_change: prepare for any policy that `change` may bring.
        """
        if not self._backend.attend_variants or self._timeline.num_chunks < 2:
            return
        variants: set[bool] | None = None
        if rules := [rule for rule in self._rules_to_come() if rule is not None]:
            variants = {rule.own_block for rule in rules if not rule.is_fixed}
        if settings_may_change:
            variants = {False, True}
        started = time.perf_counter()
        self._launch_all(variants)
        log.info("sparse attention: kernels ready after %.1f s", time.perf_counter() - started)

    def _launch_all(self, own_block_variants: set[bool] | None) -> None:
        """What `warm_up.launch_all` is asked for."""
        launch_all(self._backend, self.cache, self._query_block_tokens, own_block_variants)

    def _rules_to_come(self) -> Iterator[SelectionRule | None]:
        """Of the planned chunks, each at its own sparsity."""
        timeline, per_frame = self._timeline, self.cache.spec.blocks_per_frame
        for chunk in range(timeline.num_chunks):
            frames, visible = timeline.frames(chunk), timeline.visible_frames(chunk)
            view = KeyView(
                tuple(range(visible)), tuple(range(visible - frames, visible)), per_frame
            )
            sparsity = self.settings.sparsity(chunk, timeline, view.num_blocks)
            if frames < visible and sparsity:
                yield self.settings.policy.rule(view, sparsity)

    def begin_chunk(self, chunk: int | None) -> None:
        """Take the sparsity of a chunk, and send the device what its passes will need.

        Args: chunk index from 0, its frames in the cache already; None for given frames.
        """
        self._plans.clear()
        self._counts.clear()
        self._prepared.clear()
        self._q_grid = self._query_grid()
        view = self._view()
        self._sparsity = self._chunk_sparsity(chunk, view)
        for step in (0, 1, None):
            for layer in range(self.cache.spec.num_layers):
                sparsity = self._pass_sparsity(step, layer)
                if sparsity not in self._prepared:
                    self._prepared[sparsity] = self._prepare(view, sparsity)
        if all(prepared is None for prepared in self._prepared.values()):
            self._sparsity, self._prepared = 0.0, {0.0: None}  # the policy is dense

    def begin_pass(self, step: int | None) -> None:
        self._step = step

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v of the open chunk, [B, S, H, D], q and k rotated; returns [B, S, H, D]."""
        self.cache.write(layer, k, v)
        prepared = self._prepared[self._pass_sparsity(self._step, layer)]
        if prepared is None:
            self._counts.append(None)
            with self._watch.span("attend"):
                return dense_attention(q, *self.cache.visible(layer))
        with self._watch.span("select"):
            plan = self._plan(layer, q, prepared)
        self._counts.append(plan.kv_counts)
        with self._watch.span("attend"):
            keys, values = self.cache.visible_slots(layer)
            precision: dict[str, Tensor] = {}
            if self.cache.spec.int8_keys:
                keys, precision["k_scales"] = self.cache.visible_int8(layer)
            return self._backend.block_sparse_attention(
                q,
                keys,
                values,
                plan.kv_indices,
                plan.kv_counts,
                q_grid=self._q_grid,
                kv_grid=self.cache.spec.grid,
                **precision,
            )

    def tally(self) -> Callable[[], AttentionStatistics]:
        """As `ChunkAttention.tally`."""
        taken, density, sparsity = self._watch.close(), self._density(), self._sparsity

        def read() -> AttentionStatistics:
            seconds = taken()
            return AttentionStatistics(
                sparsity=sparsity,
                density=density(),
                select_seconds=seconds.get("select", 0.0),
                attend_seconds=seconds.get("attend", 0.0),
            )

        return read

    def _chunk_sparsity(self, chunk: int | None, view: KeyView) -> float:
        alone = len(view.own_slots) == len(view.slot_frames)
        if chunk is None or alone or self._off:
            return 0.0
        return self.settings.sparsity(chunk, self._timeline, view.num_blocks)

    def _pass_sparsity(self, step: int | None, layer: int) -> float:
        num_layers = self.cache.spec.num_layers
        return self.settings.budgets.sparsity(self._sparsity, step, layer, num_layers)

    def _query_grid(self) -> BlockGrid:
        """Query blocks of the open chunk; unlike key blocks they run over frame borders.

        832x480 has 12.2 blocks of 128 a frame: blocks that ended with each frame would be 39 a
        chunk of three and not 37. The released code cuts the flattened chunk too.
        """
        frames = max(len(self.cache.open_slots), 1)
        return BlockGrid(frames * self.cache.spec.frame_tokens, self._query_block_tokens)

    def _view(self) -> KeyView:
        cache = self.cache
        return KeyView(cache.slot_frames, cache.open_slots, cache.spec.blocks_per_frame)

    def _prepare(self, view: KeyView, sparsity: float) -> _Prepared | None:
        """None: dense."""
        rule = self.settings.policy.rule(view, sparsity) if sparsity else None
        if rule is None:
            return None
        own = None
        if rule.own_block:
            own = self._send(
                own_blocks(
                    view,
                    self.cache.spec.frame_tokens,
                    self._q_grid.block_tokens,
                    self.cache.spec.block_tokens,
                )
            )
        fixed = self._send(fixed_blocks(view, rule)) if rule.is_fixed else None
        return _Prepared(rule, self._send(rule.roles), own, fixed)

    def _send(self, numbers: Sequence[int]) -> Tensor:
        return on_host(numbers, self._device).to(self._device, non_blocking=True)

    def _plan(self, layer: int, q: Tensor, prepared: _Prepared) -> _Plan:
        """The layer's plan so far where it may be used again, else a new one."""
        plan = self._plans.get(layer)
        if plan is not None and plan.prepared is prepared:
            needs_scores = prepared.fixed is None
            if not (needs_scores and self.settings.plans_anew(self._step)):
                return plan
        plan = _Plan(prepared, *self._select(layer, q, prepared))
        self._plans[layer] = plan
        return plan

    def _select(self, layer: int, q: Tensor, prepared: _Prepared) -> tuple[Tensor, Tensor]:
        rule = prepared.rule
        if prepared.fixed is not None:
            rows = (q.shape[0], q.shape[2], self._q_grid.blocks_per_segment)
            indices = prepared.fixed.expand(*rows, rule.top_k).contiguous()
            return indices, torch.full(rows, rule.top_k, dtype=torch.int32, device=self._device)
        return self._backend.select_blocks(
            self._backend.pool_blocks(q, self._q_grid, padded=False),
            self.cache.visible_pooled(layer),
            blocks_per_segment=self.cache.spec.blocks_per_frame,
            roles=prepared.roles,
            keep_candidates=rule.keep_candidates,
            top_k=rule.top_k,
            own_blocks=prepared.own_blocks,
        )

    def _density(self) -> Callable[[], float]:
        """Kept share of all block pairs, mean over the chunk's layers and passes so far."""
        sparse = [counts for counts in self._counts if counts is not None]
        if not sparse:
            return lambda: 1.0
        passes, dense = len(self._counts), len(self._counts) - len(sparse)
        pairs = sparse[0].numel() * self._view().num_blocks
        kept = torch.stack(sparse).sum(dtype=torch.int64)
        arrived = None
        if kept.device.type == "cuda":
            on_host = torch.empty(1, dtype=torch.int64, pin_memory=True)
            kept = on_host.copy_(kept, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(self._device))

        def read() -> float:
            if arrived is not None:
                arrived.synchronize()
            return (dense + int(kept) / pairs) / passes

        return read
