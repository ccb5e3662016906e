"""A pool of encoded clips on the device, made once per run.

Rendering and encoding cost several times a training step, so they are done once for some tens of
thousands of clips, and for many more openings (the first chunk only): what follows the first chunk
is nearly determined by it, so openings are where variety is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..lightforcing_core.vae.taehv import FRAMES_PER_LATENT, TAEHV
from .autoencoder import encode_video
from .common import Run
from .conditioning import PromptRows
from .scenes import FRAMES, Scenes, render, sample_attributes
from .vocabulary import CAMERAS, COLOURS, DIRECTIONS, SHAPES, SIZES, SPEEDS, TEXTURES, TONES

CHUNK = 3  # latent frames
_UNPROMPTED_SHARE = 1 / 128
# Later objects are learned last: training shows more of them than a user would ask for.
_COUNT_WEIGHTS = (0.35, 0.35, 0.3)


@dataclass(frozen=True)
class Batch:
    """Clips or openings with their prompts.

    Attributes:
        latents: [B, 16, F, h, w].
        rows: int64 [B, rows, 2], see `PromptRows`.
        placement: float32 [B, PLACEMENT_DIMS].
    """

    latents: Tensor
    rows: Tensor
    placement: Tensor

    def __len__(self) -> int:
        return self.latents.shape[0]

    def sample(self, size: int, generator: torch.Generator) -> Batch:
        """Random members, with repetition."""
        index = torch.randint(len(self), (size,), generator=generator, device=generator.device)
        return Batch(*(getattr(self, f.name)[index] for f in fields(self)))


def default_scene(scenes: Scenes) -> Scenes:
    """The same placements in the scene that an empty prompt stands for."""

    def constant(like: Tensor, index: int) -> Tensor:
        return torch.full_like(like, index)

    return replace(
        scenes,
        count=constant(scenes.count, 1),
        colour=constant(scenes.colour, COLOURS.index("red")),
        shape=constant(scenes.shape, SHAPES.index("circle")),
        size=constant(scenes.size, SIZES.index("large")),
        direction=constant(scenes.direction, DIRECTIONS.index("right")),
        speed=constant(scenes.speed, SPEEDS.index("slowly")),
        texture=constant(scenes.texture, TEXTURES.index("plain")),
        tone=constant(scenes.tone, TONES.index("grey")),
        camera=constant(scenes.camera, CAMERAS.index("static")),
        pillar=torch.zeros_like(scenes.pillar),
    )


def sample_training(
    batch: int, prompt_rows: PromptRows, generator: torch.Generator
) -> tuple[Scenes, Tensor]:
    """Scenes and prompt rows to train on; a few have an empty prompt and are the default scene."""
    scenes = sample_attributes(batch, generator, count_weights=_COUNT_WEIGHTS)
    rows = prompt_rows.indices(scenes, generator)
    bare = torch.rand(batch, generator=generator, device=generator.device) < _UNPROMPTED_SHARE
    default = default_scene(scenes)

    def mix(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(bare.view(-1, *[1] * (a.ndim - 1)), a, b)

    names = [f.name for f in fields(scenes)]
    mixed = Scenes(*(mix(getattr(default, name), getattr(scenes, name)) for name in names))
    return mixed, mix(torch.full_like(rows, -1), rows)


@torch.no_grad()
def build_pool(
    run: Run,
    model: TAEHV,
    prompt_rows: PromptRows,
    *,
    clips: int,
    latent_frames: int,
    stream: int,
    at_once: int = 64,
) -> Batch:
    """Render and encode.

    Args:
        run: device and seed.
        model: the autoencoder, on the device.
        prompt_rows: on the device.
        clips: how many.
        latent_frames: length of each.
        stream: number of the random stream, different for each pool.
        at_once: clips per rendering.
    """
    generator = run.generator(stream)
    length = 1 + FRAMES_PER_LATENT * (latent_frames - 1)
    times = torch.arange(min(length, FRAMES), device=run.device, dtype=torch.float32)
    model = model.to(run.dtype)
    if run.fast:
        model = model.to(memory_format=torch.channels_last)
    draw = render
    if run.fast:
        draw = torch.compile(render, dynamic=False)
    parts: list[Batch] = []
    at_once = min(at_once, clips)
    for _ in range(-(-clips // at_once)):
        scenes, rows = sample_training(at_once, prompt_rows, generator)
        latents = encode_video(model, draw(scenes, times))
        parts.append(Batch(latents, rows, scenes.placement))
    return Batch(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Batch)))
