"""The chunk loop: noise to latents, chunk by chunk, as a generator.

Per chunk: a few denoising forwards, each predicting the clean latents and noising them again to
the next level; then one clean pass at timestep 0 that writes the finished chunk's keys and
values. The chunk is yielded before its clean pass, so whoever decodes it can start at once, and
the last chunk's clean pass, which nobody would read, never runs.

Reference: Self Forcing `CausalInferencePipeline.inference`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attention import CachedAttention, ChunkAttention
from .errors import Cancelled, UserError
from .fast.engine import ForwardEngine
from .kv_cache import CacheSpec, KVCache
from .layout import context_lengths
from .noise import NoiseSource
from .rollout_settings import RolloutSettings
from .sparse import SparseAttention, sparse_backend
from .sparse_settings import SparseSettings
from .stopwatch import Stopwatch
from .timesteps import TRAIN_TIMESTEPS, check_steps
from .wan.forward import PositionTable, TextContext, position_table, wan_forward

log = logging.getLogger("lightforcing")


@dataclass(frozen=True)
class ChunkStatistics:
    """What one chunk was and cost.

    Attributes:
        index: chunk, from 0.
        first_frame, num_frames: absolute latent frames.
        kv_frames: latent frames attention saw, the chunk's own included.
        sparsity: share of (query block, key block) pairs asked to be skipped, 0..1.
        density: share of pairs computed, 0..1, mean over heads, layers and denoising passes.
        forwards: forwards since the previous chunk was ready (clean passes included).
        denoise_seconds: denoising forwards.
        clean_seconds: clean passes of what came before this chunk (previous chunk or given
            frames).
        select_seconds, attend_seconds: of those forwards, in choosing blocks and in attending; what
            an engine replays is not taken apart and not counted.
    """

    index: int
    first_frame: int
    num_frames: int
    steps: int
    kv_frames: int
    sparsity: float
    density: float
    forwards: int
    denoise_seconds: float
    clean_seconds: float
    select_seconds: float = 0.0
    attend_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.denoise_seconds + self.clean_seconds

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": self.seconds}


@dataclass(frozen=True)
class Chunk:
    """A finished chunk.

    Attributes:
        latents: float32 [B, C, frames, h, w], normalised.
        attention: the run's; what it says (`SparseAttention.plans`) is of this chunk until the
            next one is asked for.
    """

    latents: Tensor
    statistics: ChunkStatistics
    attention: ChunkAttention


@dataclass(frozen=True)
class ModelCall:
    """One forward that a rollout needs, for a host that runs its models itself.

    Attributes:
        latents: noisy, float32 [B, C, F, h, w].
        timestep: of all frames, 0..1000.
        frames: their absolute latent frame indices.
        step: denoising step from 0; None for a clean pass, whose result nobody reads.
        velocity: the forward, to be called exactly once, where the host's model would run: x
            [B, C, F, h, w] in the forwards' dtype and the prompt, to the velocity in x's dtype.
    """

    latents: Tensor
    timestep: float
    frames: Sequence[int]
    step: int | None
    velocity: Callable[[Tensor, TextContext], Tensor]


# Runs a forward; returns clean latents, float32 [B, C, F, h, w].
ModelHost = Callable[[ModelCall], Tensor]


class _Denoiser:
    """One run's state: cache, text, and the forward with both."""

    def __init__(
        self,
        tree: nn.Module,
        text: TextContext | None,
        cache: KVCache,
        attend: ChunkAttention,
        dtype: torch.dtype,
        should_stop: Callable[[], bool],
        engine: ForwardEngine | None,
        host: ModelHost | None,
        order: Sequence[int] | None,
    ) -> None:
        self.tree = tree
        self.text = text
        self.cache = cache
        self.attend = attend
        self.dtype = dtype
        self.should_stop = should_stop
        self.engine = engine
        self.host = host
        self.order = order
        self.forwards = 0

    def positions(self, frames: Sequence[int], latents: Tensor) -> PositionTable:
        height, width = latents.shape[-2:]
        return position_table(self.tree, frames, height, width, latents.device, self.order)

    def predict(
        self,
        latents: Tensor,
        timestep: float,
        frames: Sequence[int],
        step: int | None,
        positions: PositionTable,
    ) -> Tensor:
        """Clean latents as one forward sees them."""
        if self.should_stop():
            raise Cancelled("stopped at the caller's request")
        self.forwards += 1
        self.attend.begin_pass(step)

        def velocity(x: Tensor, text: TextContext) -> Tensor:
            timesteps = torch.full((x.shape[0], x.shape[2]), timestep, device=x.device)
            if self.engine is not None:
                return self.engine(x, timesteps, frames, text, self.attend, positions)
            return wan_forward(self.tree, x, timesteps, frames, text, self.attend, positions)

        # Not kept as an attribute: a cycle would hold the cache until Python looks for cycles.
        run = self.host or self._run_model
        return run(ModelCall(latents, timestep, frames, step, velocity))

    def _run_model(self, call: ModelCall) -> Tensor:
        """The host where there is none."""
        assert self.text is not None
        velocity = call.velocity(call.latents.to(self.dtype), self.text)
        sigma = call.timestep / TRAIN_TIMESTEPS
        # Float64 as in Self Forcing: the difference of two large terms.
        return (call.latents.double() - sigma * velocity.double()).float()

    def clean_pass(self, latents: Tensor, timestep: float, frames: Sequence[int]) -> None:
        """Write the keys and values of finished latents and close their chunk."""
        self.predict(latents, timestep, frames, None, self.positions(frames, latents))
        self.cache.commit()

    def denoise(self, noise: NoiseSource, steps: Sequence[float], frames: Sequence[int]) -> Tensor:
        """Clean latents of the open chunk, float32 [B, C, F, h, w]."""
        latents = noise.initial(frames).float()
        positions = self.positions(frames, latents)
        for step, timestep in enumerate(steps):
            if step:
                sigma = timestep / TRAIN_TIMESTEPS
                fresh = noise.renoise(frames, step).float()
                latents = (1 - sigma) * latents + sigma * fresh
            latents = self.predict(latents, timestep, frames, step, positions)
        return latents


def _check_given(latents: Tensor, shape: tuple[int, int, int, int]) -> None:
    if latents.ndim != 5 or (*latents.shape[:2], *latents.shape[3:]) != tuple(shape):
        batch, channels, height, width = shape
        raise UserError(
            f"given latents must be [{batch}, {channels}, frames, {height}, {width}] like the "
            f"video they begin, got {list(latents.shape)}; encode the picture at the video's size"
        )
    if not bool(torch.isfinite(latents).all()):
        raise UserError("given latents hold NaN or infinity; encode the picture again")


def cache_spec(
    tree: nn.Module,
    settings: RolloutSettings,
    *,
    batch: int,
    latent_height: int,
    latent_width: int,
    dtype: torch.dtype,
    given_frames: int = 0,
) -> CacheSpec:
    """The key/value cache that a run of these settings needs."""
    dim = tree.patch_embedding.weight.shape[0]
    _, patch_h, patch_w = tree.patch_size
    sparse = settings.sparse
    capacity = settings.capacity_frames(given_frames)
    frame_tokens = (latent_height // patch_h) * (latent_width // patch_w)
    return CacheSpec(
        batch=batch,
        num_layers=len(tree.blocks),
        num_heads=tree.num_heads,
        head_dim=dim // tree.num_heads,
        frame_tokens=frame_tokens,
        capacity_frames=capacity,
        # A video shorter than its window never drops a frame: its sinks are just frames.
        sink_frames=min(settings.sink_frames, capacity - 1),
        block_tokens=0 if sparse is None else sparse.key_block(frame_tokens),
        dtype=dtype,
        int8_keys=sparse is not None and sparse.qk_precision == "int8",
    )


def _attention(
    settings: RolloutSettings,
    spec: CacheSpec,
    device: torch.device,
    given_frames: int,
    engine: ForwardEngine | None,
) -> tuple[KVCache, ChunkAttention]:
    """The cache of a run, and the attention over it."""
    if settings.sparse is None and engine is not None:
        attend = engine.dense_attention(spec, device)
        return attend.cache, attend
    if settings.sparse is None:
        cache = KVCache(spec, device)
        return cache, CachedAttention(cache, Stopwatch(device))
    timeline = settings.timeline(given_frames)
    backend = sparse_backend(settings.sparse, spec, device)
    if engine is not None and not spec.int8_keys:
        attend = engine.attention(spec, settings.sparse, timeline, backend, device)
        return attend.cache, attend
    if engine is not None and spec.int8_keys:
        log.info("eight-bit products: attention is neither fused with projections nor recorded")
    cache = KVCache(spec, device, backend.pool_blocks, backend.quantise_blocks)
    return cache, SparseAttention(cache, settings.sparse, timeline, backend)


@torch.no_grad()
def rollout(
    tree: nn.Module,
    settings: RolloutSettings,
    text: TextContext | None,
    noise: NoiseSource,
    *,
    given_latents: Tensor | None = None,
    dtype: torch.dtype | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    engine: ForwardEngine | None = None,
    host: ModelHost | None = None,
    sparse_for_chunk: Callable[[int], SparseSettings | None] | None = None,
) -> Iterator[Chunk]:
    """Generate a video chunk by chunk.

    Args:
        tree: Wan-shaped module tree, on the device to run on.
        settings: lengths, steps, window.
        text: from `prepare_text`; None only with a host, which brings the prompt itself.
        noise: decides batch, size and device.
        given_latents: frames the video continues from, float [B, C, n, h, w], normalised:
            one frame for image to video, more to extend a video. They are written to the cache
            by clean passes and are not yielded.
        dtype: of the forwards and the cache; default: the tree's.
        should_stop: asked before every forward.
        engine: runs the forwards of this run faster, see `fast.engine`; None: as they stand.
        host: runs the forwards instead of this function, see `ModelCall`.
        sparse_for_chunk: asked before every chunk (index from 0) for its settings, None: dense.
            Needs `settings.sparse`, whose block sizes, token order and backend hold for the whole
            run.

    Yields:
        Each chunk as soon as its last denoising step is done.

    Raises:
        Cancelled: `should_stop` said so.
        UserError: settings that do not fit together, or too little memory.
    """
    if text is None and host is None:
        raise ValueError("without a host, a rollout needs a text")
    if dtype is None:
        dtype = text.keys[0].dtype if text is not None else tree.patch_embedding.weight.dtype
    given_frames = 0 if given_latents is None else given_latents.shape[2]
    lengths = settings.chunk_lengths(given_frames)
    given_lengths = context_lengths(given_frames, settings.frames_per_chunk)
    batch, _, height, width = noise.shape
    device = noise.device
    if given_latents is not None:
        _check_given(given_latents, noise.shape)
    spec = cache_spec(
        tree,
        settings,
        batch=batch,
        latent_height=height,
        latent_width=width,
        dtype=dtype,
        given_frames=given_frames,
    )
    spec.check_chunks([*given_lengths, *lengths])
    cache, attend = _attention(settings, spec, device, given_frames, engine)
    if sparse_for_chunk is not None and not isinstance(attend, SparseAttention):
        raise ValueError("settings by chunk need a run whose own settings are sparse")
    if isinstance(attend, SparseAttention):
        attend.warm_up(settings_may_change=sparse_for_chunk is not None)
    order = None
    if settings.sparse is not None:
        _, patch_h, patch_w = tree.patch_size
        order = settings.sparse.frame_order(height // patch_h, width // patch_w)
    denoiser = _Denoiser(tree, text, cache, attend, dtype, should_stop, engine, host, order)
    watch = Stopwatch(device)
    with engine.run() if engine is not None else nullcontext():
        first = 0
        if given_latents is not None:
            with watch.span("clean"):
                for length in given_lengths:
                    frames = range(first, first + length)
                    cache.enter(frames)
                    attend.begin_chunk(None)
                    latents = given_latents[:, :, first : first + length].to(device).float()
                    denoiser.clean_pass(latents, settings.context_timestep, frames)
                    first += length

        finished: tuple[Tensor, range] | None = None
        for index, length in enumerate(lengths):
            if finished is not None:
                with watch.span("clean"):
                    denoiser.clean_pass(finished[0], settings.context_timestep, finished[1])
            frames = range(first, first + length)
            first += length
            own_list = index == 0 and settings.first_chunk_steps is not None
            steps = check_steps(settings.first_chunk_steps if own_list else settings.steps)
            cache.enter(frames)
            if sparse_for_chunk is not None and isinstance(attend, SparseAttention):
                attend.change(sparse_for_chunk(index))
            attend.begin_chunk(index)
            with watch.span("denoise"):
                latents = denoiser.denoise(noise, steps, frames)
            # The only time the host waits in a chunk: for its last forward, not for other streams.
            taken = watch.take()
            attention = attend.statistics()
            statistics = ChunkStatistics(
                index=index,
                first_frame=frames.start,
                num_frames=length,
                steps=len(steps),
                kv_frames=cache.visible_frames,
                sparsity=attention.sparsity,
                density=attention.density,
                forwards=denoiser.forwards,
                denoise_seconds=taken["denoise"],
                clean_seconds=taken.get("clean", 0.0),
                select_seconds=attention.select_seconds,
                attend_seconds=attention.attend_seconds,
            )
            denoiser.forwards = 0
            yield Chunk(latents, statistics, attend)
            finished = (latents, frames)
