"""The main job without ComfyUI: a prompt in, an mp4 out, chunk by chunk."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoints.checkpoint import open_checkpoint
from .checkpoints.load import LoadedModel, load_checkpoint
from .checkpoints.lora import check_loras, load_lora
from .chunk import ChunkStatistics
from .embedded import EMBEDDED_MODEL, EMBEDDED_VAE
from .errors import Cancelled, UserError
from .fast.decode import ChunkDecoder
from .fast.engine import ForwardEngine, engine_for
from .fast.linears import EIGHT_BIT_SPEEDS
from .layout import FrameSize
from .memory import GIB, usable_device
from .noise import SeededNoise, check_seed
from .outputs import check_output
from .presets import eight_bit_obstacles
from .request import GenerateRequest, check_cache, frames_to_generate, settings_for
from .rollout import rollout
from .rollout_settings import RolloutSettings
from .text.load import load_text_encoder
from .timesteps import check_steps
from .vae.load import load_vae
from .vae.streaming import DEFAULT_LATENTS_PER_PASS, VideoVAE
from .video_io import VideoWriter, load_image
from .wan.forward import TextContext, prepare_text

log = logging.getLogger("lightforcing")

FRAME_RATE = 16  # frames per second that Wan models are trained at


@dataclass(frozen=True)
class ChunkReport:
    """One chunk, as reported to whoever watches: its number, what it cost, what it gave."""

    index: int
    num_chunks: int
    pixel_frames: int
    statistics: ChunkStatistics
    decode_seconds: float

    @property
    def seconds(self) -> float:
        return self.statistics.seconds + self.decode_seconds

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.statistics.to_dict(),
            "pixel_frames": self.pixel_frames,
            "decode_seconds": self.decode_seconds,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class GenerateResult:
    """A finished video.

    Attributes:
        seconds: sampling and decoding without loading.
        preset: that options were taken from.
        peak_allocated_gib, peak_reserved_gib: most GPU memory that tensors took, and that torch
            held for them, from when the text encoder was gone; None on the CPU.
    """

    out: Path
    frames: int
    size: FrameSize
    seed: int
    seconds: float
    load_seconds: float
    chunks: tuple[ChunkReport, ...]
    device: str
    dtype: torch.dtype
    settings: RolloutSettings
    preset: str | None = None
    peak_allocated_gib: float | None = None
    peak_reserved_gib: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "frames": self.frames,
            "fps": FRAME_RATE,
            "width": self.size.width,
            "height": self.size.height,
            "seed": self.seed,
            "seconds": self.seconds,
            "load_seconds": self.load_seconds,
            "frames_per_second": self.frames / self.seconds,
            "device": self.device,
            "dtype": str(self.dtype).removeprefix("torch."),
            "preset": self.preset,
            "peak_allocated_gib": self.peak_allocated_gib,
            "peak_reserved_gib": self.peak_reserved_gib,
            "settings": asdict(self.settings),
            "chunks": [chunk.to_dict() for chunk in self.chunks],
        }


def generate(
    request: GenerateRequest,
    *,
    on_load: Callable[[int, int], None] = lambda done, total: None,
    on_chunk: Callable[[ChunkReport], None] = lambda report: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> GenerateResult:
    """Make one video file.

    Args:
        request: what to make.
        on_load: told how many bytes of the model are read, and of how many.
        on_chunk: called after each chunk's frames are written.
        should_stop: asked before every forward of the denoiser.

    Raises:
        UserError: bad input, or a run that failed; nothing is left under the final name, and
            frames made before a failure are in a file that the message names.
        Cancelled: `should_stop` said so; the frames so far stay in a file that says so.
    """
    _check(request)
    device, dtype = placement(request.device, request.dtype)
    try:
        return _generate(request, device, dtype, on_load, on_chunk, should_stop)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(device) from error
    except RuntimeError as error:
        # The CPU allocator has no exception class of its own.
        if "can't allocate memory" not in str(error):
            raise
        raise _out_of_memory(device) from error


def _out_of_memory(device: torch.device) -> UserError:
    return UserError(
        f"{device} ran out of memory; use a smaller --size or --window, fewer --frames, "
        "--dtype bfloat16, or --preset low-memory"
    )


def _check(request: GenerateRequest) -> None:
    """All that can be refused before anything is loaded."""
    inputs = (request.model, request.vae, request.text_encoder, request.start_image)
    inputs += tuple(path for path, _ in request.loras)
    check_output(request.out, inputs)
    if request.out.suffix.lower() != ".mp4":
        raise UserError(f"{request.out} must end in .mp4, the only video format written")
    for path in inputs:
        if path is not None and not path.exists():
            raise UserError(f"no such file: {path}; check the path")
    if request.model is not None and (request.vae is None or request.text_encoder is None):
        missing = " and ".join(
            name
            for name, path in (("--vae", request.vae), ("--text-encoder", request.text_encoder))
            if path is None
        )
        raise UserError(
            f"{missing} missing: a model of your own needs its Wan 2.1 VAE (or TAEHV, LightVAE) "
            "and its UMT5 text encoder; leave --model out to use the embedded one"
        )
    if request.decode_frames is not None and request.decode_frames < 1:
        raise UserError(f"--decode-frames must be at least 1, got {request.decode_frames}")
    check_seed(request.seed)
    if request.frames is not None:
        frames_to_generate(request, request.frames)
    for steps in (request.steps, request.first_chunk_steps):
        if steps is not None:
            check_steps(steps)
    if request.start_image is not None:
        load_image(request.start_image, 16, 16)
    if not request.prompt.strip():
        log.warning("the prompt is empty; the model will make something up")


def _generate(
    request: GenerateRequest,
    device: torch.device,
    dtype: torch.dtype,
    on_load: Callable[[int, int], None],
    on_chunk: Callable[[ChunkReport], None],
    should_stop: Callable[[], bool],
) -> GenerateResult:
    started = time.perf_counter()
    job = _prepare(request, device, dtype, on_load)
    for note in job.model.notes:
        log.warning(note)
    load_seconds = time.perf_counter() - started

    started = time.perf_counter()
    reports: list[ChunkReport] = []
    size = job.size
    writer = VideoWriter(request.out, size.width, size.height, FRAME_RATE)
    try:
        with writer:
            for frames, report in _stream(job, request, should_stop):
                writer.write(frames)
                if report is not None:
                    reports.append(report)
                    on_chunk(report)
            seconds = time.perf_counter() - started
    except (Cancelled, KeyboardInterrupt) as error:
        raise Cancelled(f"stopped; {_kept(writer) or 'nothing was made'}") from error
    except UserError as error:
        kept = _kept(writer)
        raise UserError(f"{error}; {kept}" if kept else str(error)) from error
    return GenerateResult(
        out=request.out,
        frames=writer.frames_written,
        size=size,
        seed=request.seed,
        seconds=seconds,
        load_seconds=load_seconds,
        chunks=tuple(reports),
        device=str(device),
        dtype=dtype,
        settings=job.settings,
        preset=request.preset,
        **_peak_memory(device),
    )


def _peak_memory(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    return {
        "peak_allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "peak_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
    }


def _kept(writer: VideoWriter) -> str:
    if writer.saved_path is None:
        return ""
    return f"the first {writer.frames_written} frames are in {writer.saved_path}"


@dataclass(frozen=True)
class _Job:
    """Everything loaded and checked; nothing sampled yet."""

    model: LoadedModel
    vae: VideoVAE
    text: TextContext
    settings: RolloutSettings
    size: FrameSize
    start_frame: Tensor | None  # float [1, 1, 3, H, W], 0..1
    device: torch.device
    dtype: torch.dtype
    engine: ForwardEngine | None


def placement(
    device_name: str | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """Where a request runs and in what; None: see `GenerateRequest`.

    Raises:
        UserError: the device cannot be used.
    """
    device = usable_device(device_name)
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, dtype or default


def _prepare(
    request: GenerateRequest,
    device: torch.device,
    dtype: torch.dtype,
    on_load: Callable[[int, int], None],
) -> _Job:
    # What is wrong with any file should show before gigabytes are read.
    checkpoint = open_checkpoint(request.model or EMBEDDED_MODEL, family=request.family)
    checkpoint.check_whole()
    loras = [(load_lora(path), strength) for path, strength in request.loras]
    check_loras([lora for lora, _ in loras], checkpoint.shapes)
    settings, size = settings_for(request, checkpoint.preset)
    config = checkpoint.config
    check_cache(config, settings, size, request.given_frames, device, dtype)
    eight_bit = EIGHT_BIT_SPEEDS.get(request.speed or "")
    if eight_bit is not None:
        widths = config.dim, config.ffn_dim
        if obstacles := eight_bit_obstacles(str(request.speed), device, dtype, widths):
            raise UserError(
                f"the speed '{request.speed}' cannot be used: {'; '.join(obstacles)}; "
                "choose 'plain'"
            )
    log.info("settings: %s", settings)
    vae = load_vae(
        request.vae or EMBEDDED_VAE, device=device, dtype=dtype, latents=request.vae_latents
    )
    embeds = _encode(request, device, dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model = load_checkpoint(
        checkpoint,
        device=device,
        dtype=dtype,
        loras=loras,
        eight_bit=eight_bit,
        on_progress=on_load,
    )
    with torch.no_grad():
        text = prepare_text(model.tree, embeds)
    start_frame = None
    if request.start_image is not None:
        start_frame = load_image(request.start_image, size.width, size.height)[:, None]
    engine = engine_for(model.tree, request.speed, replace=True)
    _free_unused(device)  # eight-bit layers leave the place of those that they were made from
    return _Job(model, vae, text, settings, size, start_frame, device, dtype, engine)


def _encode(request: GenerateRequest, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Prompt embeddings. The encoder is gone when this returns: UMT5 is several times the size
    of the denoiser, and the two need not be in memory together."""
    text_device = usable_device(request.text_device) if request.text_device else device
    encoder = load_text_encoder(request.text_encoder, text_device, dtype)
    embeds = encoder.encode(request.prompt).to(device=device, dtype=dtype)
    del encoder
    _free_unused(device)
    return embeds


def _free_unused(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _stream(
    job: _Job, request: GenerateRequest, should_stop: Callable[[], bool]
) -> Iterator[tuple[np.ndarray, ChunkReport | None]]:
    """Frames uint8 [t, H, W, 3] on the host as they are made, with a report per chunk."""
    given = None
    if job.start_frame is not None:
        given = job.vae.new_encoder().encode(job.start_frame.to(job.device, job.dtype))
    channels = job.model.config.in_dim
    shape = (1, channels, job.size.latent_height, job.size.latent_width)
    noise = SeededNoise(request.seed, shape, job.device)
    num_chunks = len(job.settings.chunk_lengths(0 if given is None else given.shape[2]))
    decoding_of: deque[ChunkStatistics | None] = deque()  # None: of the start picture
    at_once = request.decode_frames or DEFAULT_LATENTS_PER_PASS
    decoder = job.vae.new_decoder(latents_per_pass=at_once)
    with ChunkDecoder(decoder, job.device) as decoding:

        def reported(*, wait: bool) -> Iterator[tuple[np.ndarray, ChunkReport | None]]:
            for decoded in decoding.take(wait=wait):
                statistics = decoding_of.popleft()
                if statistics is None:
                    yield decoded.frames, None
                    continue
                yield (
                    decoded.frames,
                    ChunkReport(
                        index=statistics.index,
                        num_chunks=num_chunks,
                        pixel_frames=decoded.frames.shape[0],
                        statistics=statistics,
                        decode_seconds=decoded.seconds,
                    ),
                )

        if given is not None:
            decoding_of.append(None)
            decoding.submit(given)
            yield from reported(wait=False)
        chunks = rollout(
            job.model.tree,
            job.settings,
            job.text,
            noise,
            given_latents=given,
            dtype=job.dtype,
            should_stop=should_stop,
            engine=job.engine,
        )
        while True:
            try:
                chunk = next(chunks, None)
            except Exception:
                # Finished chunks are part of the video that is kept; why it ended matters more
                # than why one of them could not be decoded.
                with contextlib.suppress(Exception):
                    yield from reported(wait=True)
                raise
            if chunk is None:
                break
            decoding_of.append(chunk.statistics)
            decoding.submit(chunk.latents, chunk.ready)
            yield from reported(wait=False)
        yield from reported(wait=True)
