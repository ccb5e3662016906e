"""The chunk loop: noise to latents, chunk by chunk, as a generator.

Per chunk: a few denoising forwards, each predicting the clean latents and noising them again to
the next level; then one clean pass at timestep 0 that writes the finished chunk's keys and
values. Whoever decodes a chunk need not wait for its clean pass: on the CPU it runs when the next
chunk is asked for, on CUDA it is under way behind the chunk's latents. The last chunk's clean pass,
which nobody would read, never runs.

Reference: Self Forcing `CausalInferencePipeline.inference`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from traceback import clear_frames

import torch
from torch import Tensor, nn

from .attention import CachedAttention, ChunkAttention
from .chunk import Chunk, ChunkStatistics, ModelCall, ModelHost
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
from .wan.forward import (
    PositionTable,
    TextContext,
    TimeContext,
    position_table,
    prepare_time,
    wan_forward,
)

log = logging.getLogger("lightforcing")


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
        self._times: dict[tuple[float, tuple[int, int]], TimeContext] = {}

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
            time = self._time(x, timestep)
            if self.engine is not None:
                return self.engine(x, time, frames, text, self.attend, positions)
            return wan_forward(self.tree, x, time, frames, text, self.attend, positions)

        # Not kept as an attribute: a cycle would hold the cache until Python looks for cycles.
        run = self.host or self._run_model
        return run(ModelCall(latents, timestep, frames, step, velocity))

    def _time(self, x: Tensor, timestep: float) -> TimeContext:
        """Embedded once per run; a host may change the weights between forwards, and compile
        them, where a table of timesteps would be compiled anew for each."""
        shape = x.shape[0], x.shape[2]
        if self.host is not None:
            timesteps = torch.full(shape, timestep, device=x.device)
            return prepare_time(self.tree, timesteps, x.dtype)
        if (timestep, shape) not in self._times:
            timesteps = torch.full(shape, timestep, device=x.device)
            self._times[timestep, shape] = prepare_time(self.tree, timesteps, x.dtype)
        return self._times[timestep, shape]

    def _run_model(self, call: ModelCall) -> Tensor:
        """The host where there is none."""
        assert self.text is not None
        velocity = call.velocity(call.latents.to(self.dtype), self.text)
        sigma = call.timestep / TRAIN_TIMESTEPS
        # Float64 as in Self Forcing: the difference of two large terms.
        return (call.latents.double() - sigma * velocity.double()).float()

    def clean_pass(
        self, latents: Tensor, timestep: float, frames: Sequence[int], positions: PositionTable
    ) -> None:
        """Write the keys and values of finished latents."""
        self.predict(latents, timestep, frames, None, positions)

    def denoise(
        self,
        latents: Tensor,
        noise: NoiseSource,
        steps: Sequence[float],
        frames: Sequence[int],
        positions: PositionTable,
    ) -> Tensor:
        """Clean latents of the open chunk, float32 [B, C, F, h, w], from its initial noise."""
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
    watch, clean_watch = Stopwatch(device), Stopwatch(device)
    clean = settings.context_timestep
    with engine.run() if engine is not None else nullcontext():
        first = 0
        if given_latents is not None:
            with clean_watch.span("clean"):
                for length in given_lengths:
                    frames = range(first, first + length)
                    cache.enter(frames)
                    attend.begin_chunk(None)
                    latents = given_latents[:, :, first : first + length].to(device).float()
                    positions = denoiser.positions(frames, latents)
                    denoiser.clean_pass(latents, clean, frames, positions)
                    cache.commit()
                    first += length

        for index, length in enumerate(lengths):
            frames = range(first, first + length)
            first += length
            own_list = index == 0 and settings.first_chunk_steps is not None
            steps = check_steps(settings.first_chunk_steps if own_list else settings.steps)
            cache.enter(frames)
            if sparse_for_chunk is not None and isinstance(attend, SparseAttention):
                attend.change(sparse_for_chunk(index))
            attend.begin_chunk(index)
            latents = noise.initial(frames).float()
            positions = denoiser.positions(frames, latents)
            with watch.span("denoise"):
                latents = denoiser.denoise(latents, noise, steps, frames, positions)
            tally, denoised, cleaned = attend.tally(), watch.close(), clean_watch.close()
            forwards, denoiser.forwards = denoiser.forwards, 0
            ready, failure, is_cleaned = None, None, False
            if device.type == "cuda":
                ready = torch.cuda.Event()
                ready.record(torch.cuda.current_stream(device))
            is_last = index == len(lengths) - 1
            if ready is not None and not is_last:
                # So that the device has work while the host waits, reports and prepares.
                try:
                    with clean_watch.span("clean"):
                        denoiser.clean_pass(latents, clean, frames, positions)
                    is_cleaned = True
                except Exception as error:  # noqa: BLE001  the finished chunk comes first
                    failure = error
                    # And is decoded meanwhile: the forward's tensors must not take the room.
                    clear_frames(error.__traceback__)
            # The only time the host waits in a chunk: for its last step, not for what follows.
            attention = tally()
            statistics = ChunkStatistics(
                index=index,
                first_frame=frames.start,
                num_frames=length,
                steps=len(steps),
                kv_frames=cache.visible_frames,
                sparsity=attention.sparsity,
                density=attention.density,
                forwards=forwards,
                denoise_seconds=denoised()["denoise"],
                clean_seconds=cleaned().get("clean", 0.0),
                select_seconds=attention.select_seconds,
                attend_seconds=attention.attend_seconds,
            )
            try:
                yield Chunk(latents, statistics, attend, ready)
                if failure is not None:
                    raise failure
            finally:
                failure = None  # it names this frame, which names it: the cache would stay
            if not is_last:
                if not is_cleaned:
                    with clean_watch.span("clean"):
                        denoiser.clean_pass(latents, clean, frames, positions)
                cache.commit()
