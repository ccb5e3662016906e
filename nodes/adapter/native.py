"""Sparse attention under ComfyUI's own autoregressive sampler (SamplerARVideo).

That sampler hands its caches to the model in `ar_state` and drops the transformer options before
any block sees them, so the one place to answer is the diffusion model's forward. The patch put
there holds nothing of a run: the run's state lies in the sampler's own caches and dies with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...lightforcing_core.attention import CachedAttention, ChunkAttention
from ...lightforcing_core.errors import UserError
from ...lightforcing_core.kv_cache import CacheSpec, KVCache
from ...lightforcing_core.layout import chunk_lengths
from ...lightforcing_core.schedule import Timeline
from ...lightforcing_core.sparse import SparseAttention, sparse_backend
from ...lightforcing_core.wan.forward import (
    PositionTable,
    TextContext,
    position_table,
    prepare_text,
    wan_forward,
)
from .options import SparseChoice, sparse_of

_PATCHED = "diffusion_model.forward"
_RUN_KEY = "lightforcing_run"


class ForwardPatch:
    """The diffusion model's forward: ours for a chunk of SamplerARVideo, else the one it had."""

    def __init__(self, original: Callable[..., Tensor], tree: nn.Module) -> None:
        self.original = original
        self.tree = tree

    def __call__(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        *others: Any,
        transformer_options: dict[str, Any] | None = None,
        **more: Any,
    ) -> Tensor:
        options = transformer_options or {}
        state, choice = options.get("ar_state"), sparse_of(options)
        if state is None or choice is None or not choice.enabled:
            return self.original(x, timestep, context, *others, transformer_options=options, **more)
        # The list is copied on its way here, the dicts in it are the sampler's own.
        caches = state["kv_caches"]
        run = caches[0].get(_RUN_KEY)
        if run is None:
            run = caches[0][_RUN_KEY] = NativeRun(self.tree, choice, caches, x, context, options)
        return run.forward(x, timestep, int(state["start_frame"]))


def patch_forward(model: ModelPatcher, tree: nn.Module) -> None:
    """Put the patch on a clone of a MODEL, unless it is there."""
    current = model.get_model_object(_PATCHED)
    if not isinstance(current, ForwardPatch):
        model.add_object_patch(_PATCHED, ForwardPatch(current, tree))


class NativeRun:
    """One video of SamplerARVideo over our cache and attention.

    It denoises each chunk in as many forwards as there are noise levels, then writes it with one
    more at level 0; which one a forward is follows from counting, so nothing is read back from the
    device.
    """

    def __init__(
        self,
        tree: nn.Module,
        choice: SparseChoice,
        caches: list[dict[str, Any]],
        x: Tensor,
        context: Tensor,
        options: dict[str, Any],
    ) -> None:
        """
        Args:
            caches: the sampler's, a dict of k and v [B, tokens of the video, H, D] per layer. Their
                tensors are given up: ours take their place.
            x: of the first forward, [B, C, F, h, w].
            context: prompt embeddings [B, L, text_dim].
            options: transformer options of the first forward.

        Raises:
            UserError: no room for the cache, or a backend that cannot run here.
        """
        batch, _, _, height, width = x.shape
        self._tree = tree
        frame_tokens = (height // tree.patch_size[1]) * (width // tree.patch_size[2])
        total = caches[0]["k"].shape[1] // frame_tokens
        spec = CacheSpec(
            batch=batch,
            num_layers=len(tree.blocks),
            num_heads=tree.num_heads,
            head_dim=caches[0]["k"].shape[-1],
            frame_tokens=frame_tokens,
            capacity_frames=total,
            block_tokens=choice.settings.key_block(frame_tokens),
            dtype=x.dtype,
            int8_keys=choice.settings.qk_precision == "int8",
        )
        for cache in caches:
            cache["k"], cache["v"] = cache["k"][:, :0].clone(), cache["v"][:, :0].clone()
        backend = sparse_backend(choice.settings, spec, x.device)
        self._cache = KVCache(spec, x.device, backend.pool_blocks, backend.quantise_blocks)
        self._choice = choice
        self._order = choice.settings.frame_order(
            height // tree.patch_size[1], width // tree.patch_size[2]
        )
        self._positions: PositionTable | None = None  # of the open chunk
        self._backend = backend
        self._total = total
        self._given = _given_frames(options)
        self._steps = len(options["sample_sigmas"]) - 1
        self._attend: ChunkAttention = CachedAttention(self._cache)
        self._text: TextContext = prepare_text(tree, context)
        self._chunk = -1
        self._start = -1
        self._forwards = 0  # of the open chunk

    def forward(self, x: Tensor, timestep: Tensor, start: int) -> Tensor:
        """Velocity of the chunk that starts at a latent frame; timestep [B], 0..1000."""
        if x.shape[0] != self._cache.spec.batch:
            raise UserError(
                f"the model was asked for a batch of {x.shape[0]} in a video of "
                f"{self._cache.spec.batch}: guidance must be 1 for autoregressive models"
            )
        frames = range(start, start + x.shape[2])
        if start != self._start:
            self._open(frames)
            self._positions = position_table(
                self._tree, frames, x.shape[3], x.shape[4], x.device, self._order
            )
        clean = start < self._given or self._forwards == self._steps
        self._attend.begin_pass(None if clean else self._forwards)
        timesteps = timestep[:, None].expand(-1, len(frames))
        velocity = wan_forward(
            self._tree, x, timesteps, frames, self._text, self._attend, self._positions
        )
        self._forwards += 1
        if clean:
            self._cache.commit()
        return velocity

    def _open(self, frames: range) -> None:
        self._start, self._forwards = frames.start, 0
        self._cache.enter(frames)
        if frames.start < self._given:
            return
        self._chunk += 1
        if self._chunk == 0:
            self._attend = self._sparse(frames_per_chunk=len(frames))
        self._attend.begin_chunk(self._chunk)

    def _sparse(self, frames_per_chunk: int) -> SparseAttention:
        lengths = chunk_lengths(self._total - self._given, frames_per_chunk)
        timeline = Timeline(tuple(lengths), self._given)
        attention = SparseAttention(self._cache, self._choice.settings, timeline, self._backend)
        attention.warm_up()
        return attention


def _given_frames(options: dict[str, Any]) -> int:
    """Latent frames that ARVideoI2V lets the video begin with."""
    latent = options.get("ar_config", {}).get("initial_latent")
    return 0 if latent is None else int(latent.shape[2])
