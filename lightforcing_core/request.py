"""What a user asks for, and the settings it comes to with the preset of the model's file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoints.presets import Preset
from .errors import UserError
from .layout import FrameSize, latent_frames
from .rollout import cache_spec
from .rollout_settings import RolloutSettings
from .sparse_settings import SparseSettings
from .wan.config import WanConfig
from .wan.modules import WanModel

_DEFAULT_SIZE = FrameSize(832, 480)
_DEFAULT_FRAMES = 81


@dataclass(frozen=True)
class GenerateRequest:
    """What to make. None means: what the model's file suggests, else Self Forcing's settings.

    Attributes:
        frames: pixel frames, 4 k + 1, the start image included.
        start_image: picture the video begins with (image to video).
        frames_per_chunk, window_frames, sink_frames: latent frames.
        sparse: None for dense attention.
        shift: instead of the suggested steps' own; explicit steps are taken as they are.
        context_timestep: noise level of the clean pass, 0..1000.
        family: name of the weights' family (checkpoints.families), which suggests settings.
        loras: LoRA files and their strengths, merged into the weights.
        speed: one of fast.engine.SPEEDS; None: fast on a GPU, plain elsewhere.
        decode_frames: latent frames that the autoencoder decodes at a time; fewer take less memory.
        text_device: where the text encoder runs; None: where the rest does.
        preset: name of the bundle (`presets`) that options were taken from, for the report.
        device, dtype: default to CUDA and bf16 where there is a GPU, else CPU and float32.
    """

    prompt: str
    out: Path
    model: Path | None = None
    vae: Path | None = None
    text_encoder: Path | None = None
    frames: int | None = None
    size: FrameSize | None = None
    seed: int = 0
    steps: Sequence[float] | None = None
    first_chunk_steps: Sequence[float] | None = None
    shift: float | None = None
    context_timestep: float | None = None
    frames_per_chunk: int | None = None
    window_frames: int | None = None
    sink_frames: int | None = None
    sparse: SparseSettings | None = None
    start_image: Path | None = None
    vae_latents: str | None = None
    family: str | None = None
    loras: Sequence[tuple[Path, float]] = ()
    speed: str | None = None
    decode_frames: int | None = None
    text_device: str | None = None
    preset: str | None = None
    device: str | None = None
    dtype: torch.dtype | None = None

    @property
    def given_frames(self) -> int:
        """Latent frames the video starts from."""
        return 0 if self.start_image is None else 1


def frames_to_generate(request: GenerateRequest, frames: int) -> int:
    """Latent frames to generate of a video of so many pixel frames, the start image left out."""
    to_generate = latent_frames(frames) - request.given_frames
    if to_generate < 1:
        raise UserError(
            f"{frames} frame leaves nothing to generate after the start image; ask for 5 or more"
        )
    return to_generate


def settings_for(request: GenerateRequest, preset: Preset) -> tuple[RolloutSettings, FrameSize]:
    """What a request and the file's preset come to."""

    def chosen(value: Any, suggestion: Any) -> Any:
        return suggestion if value is None else value

    preset_size = _DEFAULT_SIZE
    if preset.width is not None and preset.height is not None:
        preset_size = FrameSize(preset.width, preset.height)
    preset = preset.with_shift(chosen(request.shift, preset.shift))
    frames = chosen(request.frames, preset.frames or _DEFAULT_FRAMES)
    window = chosen(request.window_frames, preset.window_frames)
    per_chunk = chosen(request.frames_per_chunk, preset.frames_per_chunk)
    # A sink belongs to a window: a preset's goes when the user asks for the whole history, and
    # shrinks when they leave it no room.
    preset_sink = 0 if window == -1 else max(min(preset.sink_frames, window - per_chunk), 0)
    settings = RolloutSettings(
        num_frames=frames_to_generate(request, frames),
        frames_per_chunk=per_chunk,
        steps=chosen(request.steps, preset.steps),
        first_chunk_steps=_first_chunk_steps(request, preset),
        window_frames=window,
        sink_frames=chosen(request.sink_frames, preset_sink),
        context_timestep=chosen(request.context_timestep, preset.context_timestep),
        sparse=request.sparse,
    )
    return settings, chosen(request.size, preset_size)


def check_cache(
    config: WanConfig,
    settings: RolloutSettings,
    size: FrameSize,
    given_frames: int,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Whether chunks fit their window and the cache fits the device, before all the loading.

    Raises:
        UserError: they do not.
    """
    with torch.device("meta"):
        tree = WanModel(config)
    spec = cache_spec(
        tree,
        settings,
        batch=1,
        latent_height=size.latent_height,
        latent_width=size.latent_width,
        dtype=dtype,
        given_frames=given_frames,
    )
    given = [given_frames] if given_frames else []
    spec.check_chunks([*given, *settings.chunk_lengths(given_frames)])
    spec.check_memory(device)


def _first_chunk_steps(request: GenerateRequest, preset: Preset) -> Sequence[float] | None:
    """A preset's own list for the first chunk belongs to its list for the others."""
    if request.first_chunk_steps is not None or request.steps is not None:
        return request.first_chunk_steps
    return preset.first_chunk_steps
