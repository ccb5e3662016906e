"""Stage 2: the block-causal flow-matching teacher.

Teacher forcing: clean and noisy frames of a clip in one sequence, one noise level per chunk, so all
seven chunks are trained at once. Beside whole clips every step takes a batch of openings (first
chunks only), which are cheap and carry what the prompt decides. Half of the noise levels are the
four that sampling uses, half are spread over all levels with shift 5.

The noise of first chunks at high levels is tied to the scene's placement (`coupling.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..lightforcing_core.embedded import EMBEDDED_TEXT
from ..lightforcing_core.text.embedded import EmbeddedTextEncoder
from ..lightforcing_core.wan.modules import WanModel
from .autoencoder import build_autoencoder
from .common import (
    Run,
    add_run_arguments,
    learning_rate,
    load_weights,
    run_from_arguments,
    save_weights,
)
from .compiled import compiled_blocks
from .conditioning import PromptRows
from .coupling import COUPLED_ABOVE, imprint
from .denoiser import (
    LEVELS,
    SHIFT,
    Positions,
    broadcast,
    build_denoiser,
    clip_velocity,
    file_metadata,
    opening_velocity,
)
from .optimizer import MasterOptimizer
from .pool import CHUNK, Batch, build_pool

_PEAK_RATE = 4e-3
_CONTEXT_NOISE = 0.1  # largest noise level of the clean stream: sampling's past is not perfect
_SAVE_EVERY_SECONDS = 60.0


def draw_levels(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Noise levels in (0, 1]: half of them the sampler's four, half shifted uniform."""
    device = generator.device
    uniform = torch.rand(shape, generator=generator, device=device)
    shifted = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
    levels = torch.tensor(LEVELS, device=device)
    chosen = levels[torch.randint(len(LEVELS), shape, generator=generator, device=device)]
    own = torch.rand(shape, generator=generator, device=device) < 0.5
    return torch.where(own, chosen, shifted)


def coupled_noise(batch: Batch, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """Noise for a batch; that of noisy first chunks stands for the scene's placement.

    Args:
        batch: float32 latents [B, 16, F, h, w].
        sigma: [B, chunks].
    """
    noise = torch.randn(batch.latents.shape, generator=generator, device=generator.device)
    tied = imprint(noise[:, :, :CHUNK], batch.placement)
    high = (sigma[:, 0] > COUPLED_ABOVE).view(-1, 1, 1, 1, 1)
    first = torch.where(high, tied, noise[:, :, :CHUNK])
    return torch.cat([first, noise[:, :, CHUNK:]], dim=2)


def hidden_matrix(name: str, parameter: Tensor) -> bool:
    """What Muon trains in the denoiser."""
    return name.startswith("blocks.") and parameter.ndim == 2


class Losses:
    """Flow-matching losses of a denoiser.

    Args:
        run: device and precision.
        model: the denoiser, on the device and in the run's dtype.
        prompt_rows: on the device.
    """

    def __init__(self, run: Run, model: WanModel, prompt_rows: PromptRows) -> None:
        self.run = run
        self.prompt_rows = prompt_rows
        self.positions = Positions(model, run.device, run.sizes.latent_frames)
        self.clip_velocity = partial(clip_velocity, model, self.positions)
        self.opening_velocity = partial(opening_velocity, model, self.positions)

    def text(self, rows: Tensor) -> Tensor:
        """Prompt rows in the network's dtype."""
        return self.prompt_rows.embed(rows, self.run.dtype)

    def flow_of_clips(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Mean squared velocity error of whole clips at random levels."""
        latents = batch.latents.float()
        shape = (len(batch), latents.shape[2] // CHUNK)
        sigma = draw_levels(shape, generator)
        noise = coupled_noise(batch, sigma, generator)
        level = broadcast(sigma)
        noisy = torch.lerp(latents, noise, level)
        strength = torch.rand(shape, generator=generator, device=generator.device)
        disturbance = torch.randn(latents.shape, generator=generator, device=generator.device)
        clean = torch.lerp(latents, disturbance, broadcast(_CONTEXT_NOISE * strength))
        dtype = self.run.dtype
        velocity = self.clip_velocity(
            clean.to(dtype), noisy.to(dtype), sigma, self.text(batch.rows)
        )
        return (velocity.float() - (noise - latents)).square().mean()

    def flow_of_openings(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """The same for first chunks alone."""
        latents = batch.latents.float()
        sigma = draw_levels((len(batch), 1), generator)
        noise = coupled_noise(batch, sigma, generator)
        noisy = torch.lerp(latents, noise, broadcast(sigma))
        velocity = self.opening_velocity(noisy.to(self.run.dtype), sigma, self.text(batch.rows))
        return (velocity.float() - (noise - latents)).square().mean()


def train_teacher(run: Run, model: WanModel, losses: Losses, clips: Batch, openings: Batch,
                  save: Callable[[dict[str, Tensor]], None]) -> WanModel:  # fmt: skip
    """Train in place; the model ends as the averaged weights."""
    sizes, generator = run.sizes, run.generator(20)
    optimizer = MasterOptimizer(model, use_muon=hidden_matrix)
    clock = run.clock()
    recent: list[Tensor] = []
    last_saved = 0.0
    while True:
        loss_clips = losses.flow_of_clips(clips.sample(sizes.batch_clips, generator), generator)
        loss_clips.backward()
        loss_openings = losses.flow_of_openings(
            openings.sample(sizes.batch_openings, generator), generator
        )
        loss_openings.backward()
        norm = optimizer.step(learning_rate(_PEAK_RATE, clock.used))
        recent.append(torch.stack([loss_clips.detach(), loss_openings.detach(), norm]))
        going = clock.tick()
        if clock.step == 2 and run.fast:
            run.log.write("teacher_compiled", used=clock.used)
            clock.restart()
        if clock.step % 100 == 0 or not going:
            clip_loss, opening_loss, gradient = torch.stack(recent).mean(0).tolist()
            run.log.write(
                "teacher", step=clock.step, used=clock.used, loss_clips=clip_loss,
                loss_openings=opening_loss, gradient=gradient,
            )  # fmt: skip
            recent.clear()
        if clock.spent - last_saved > _SAVE_EVERY_SECONDS:
            last_saved = clock.spent
            save(optimizer.averaged())
        if not going:
            break
    model.load_state_dict({k: v.to(run.dtype) for k, v in optimizer.averaged().items()})
    return model


def prepare(run: Run, resume: Path | None) -> tuple[WanModel, Losses, PromptRows]:
    """Denoiser (fresh or resumed), its losses, and the text rows."""
    prompt_rows = PromptRows(EmbeddedTextEncoder.load(EMBEDDED_TEXT), run.device)
    model = build_denoiser(run.sizes)
    if resume:
        load_weights(model, resume)
    model = model.to(run.device, run.dtype)
    return model, Losses(run, model, prompt_rows), prompt_rows


def load_pools(run: Run, autoencoder: Path, prompt_rows: PromptRows) -> tuple[Batch, Batch]:
    """Pools of clips and openings, encoded with an autoencoder file."""
    vae = build_autoencoder(run.sizes)
    load_weights(vae, autoencoder)
    vae = vae.to(run.device).eval().requires_grad_(False)
    sizes = run.sizes
    clips = build_pool(
        run, vae, prompt_rows, clips=sizes.pool_clips, latent_frames=sizes.latent_frames, stream=10
    )
    openings = build_pool(
        run, vae, prompt_rows, clips=sizes.pool_openings, latent_frames=CHUNK, stream=11,
        at_once=512,
    )  # fmt: skip
    run.log.write(
        "pool",
        clips=len(clips),
        openings=len(openings),
        std=clips.latents[:64].float().std().item(),
    )
    return clips, openings


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m lightforcing.training.teacher --autoencoder FILE --out FILE`."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser, seconds=420)
    parser.add_argument("--autoencoder", type=Path, required=True)
    arguments = parser.parse_args(argv)
    run = run_from_arguments(arguments)
    model, losses, prompt_rows = prepare(run, arguments.resume)
    clips, openings = load_pools(run, arguments.autoencoder, prompt_rows)

    def save(tensors: dict[str, Tensor]) -> None:
        save_weights(arguments.out, tensors, torch.bfloat16, file_metadata(run.sizes))

    with compiled_blocks(run.fast):
        train_teacher(run, model, losses, clips, openings, save)
    save(model.state_dict())


if __name__ == "__main__":
    main()
