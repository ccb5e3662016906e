"""Stage 3: distillation to four steps on the student's own rollouts.

The student makes whole clips exactly as the engine does: chunk by chunk through the key/value
cache, four steps each, re-noised in between, a clean pass after each chunk. Because a scene follows
from its prompt and its placement, and the noise stands for the placement (`coupling.py`), the right
result of such a rollout is known: the rendered clip. So every input the student met is an example:
from this noisy chunk, with your own earlier chunks as the past, the answer is the true latents.

All chunks of a rollout are then trained in one teacher-forced pass, with the student's own results
as its clean stream and, per chunk, the noisy input of one of the four steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..lightforcing_core.attention import CachedAttention
from ..lightforcing_core.kv_cache import CacheSpec, KVCache
from ..lightforcing_core.timesteps import TRAIN_TIMESTEPS
from ..lightforcing_core.wan.forward import TextContext, prepare_text, wan_forward
from ..lightforcing_core.wan.modules import WanModel
from .common import Run, add_run_arguments, learning_rate, run_from_arguments, save_weights
from .coupling import imprint
from .denoiser import LEVELS, Positions, broadcast, file_metadata
from .optimizer import MasterOptimizer
from .pool import CHUNK, Batch
from .teacher import Losses, load_pools, prepare

_PEAK_RATE = 5e-4
_LEVEL_WEIGHTS = (0.5, 1.0, 1.0, 2.0)  # what the last step makes is what is seen
_PASSES_PER_ROLLOUT = 2
_SAVE_EVERY_SECONDS = 60.0


@dataclass(frozen=True)
class Experience:
    """What the student met and made in rollouts of a batch.

    Attributes:
        batch: the true clips.
        inputs: noisy latents per step, [steps, B, 16, F, h, w].
        results: the student's clips, [B, 16, F, h, w].
        first_step_tied: bool [B], whether the very first noise stood for the placement.
    """

    batch: Batch
    inputs: Tensor
    results: Tensor
    first_step_tied: Tensor

    def part(self, members: slice) -> Experience:
        """Some of the clips."""
        batch = Batch(
            self.batch.latents[members], self.batch.rows[members], self.batch.placement[members]
        )
        return Experience(
            batch, self.inputs[:, members], self.results[members], self.first_step_tied[members]
        )


class Student:
    """Rollouts of the network in training.

    Args:
        run: device and precision.
        model: the denoiser.
        positions: its rotary tables.
    """

    def __init__(self, run: Run, model: WanModel, positions: Positions) -> None:
        self.run = run
        self.model = model
        self.positions = positions

    @torch.no_grad()
    def roll_out(self, batch: Batch, text_rows: Tensor, generator: torch.Generator) -> Experience:
        """Generate clips (or openings, if the batch holds those) as sampling does."""
        shape = batch.latents.shape
        text = prepare_text(self.model, text_rows)
        tied = torch.rand(shape[0], generator=generator, device=generator.device) < 0.5
        cache = self._cache(shape)
        attend = CachedAttention(cache)
        inputs, results = [], []
        for chunk, first in enumerate(range(0, shape[2], CHUNK)):
            cache.enter(range(first, first + CHUNK))
            met, made = self._denoise_chunk(chunk, batch, text, attend, tied, generator)
            inputs.append(met)
            results.append(made)
            if first + CHUNK < shape[2]:
                self._velocity(chunk, made, 0.0, text, attend)
                cache.commit()
        return Experience(batch, torch.cat(inputs, dim=3), torch.cat(results, dim=2), tied)

    def _cache(self, shape: torch.Size) -> KVCache:
        spec = CacheSpec(
            batch=shape[0],
            num_layers=len(self.model.blocks),
            num_heads=self.model.num_heads,
            head_dim=self.model.config.head_dim,
            frame_tokens=shape[3] * shape[4] // 4,
            capacity_frames=shape[2],
            dtype=self.run.dtype,
        )
        return KVCache(spec, self.run.device)

    def _velocity(
        self, chunk: int, latents: Tensor, sigma: float, text: TextContext, attend: CachedAttention
    ) -> Tensor:
        timesteps = torch.full(
            (latents.shape[0], CHUNK), sigma * TRAIN_TIMESTEPS, device=latents.device
        )
        frames = range(chunk * CHUNK, (chunk + 1) * CHUNK)
        velocity = wan_forward(
            self.model,
            latents.to(self.run.dtype),
            timesteps,
            frames,
            text,
            attend,
            self.positions.chunks[chunk],
        )
        return velocity.float()

    def _denoise_chunk(
        self,
        chunk: int,
        batch: Batch,
        text: TextContext,
        attend: CachedAttention,
        tied: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Inputs of the four steps [steps, B, 16, CHUNK, h, w], and the result."""
        size, channels, _, height, width = batch.latents.shape

        def noise(imprinted: Tensor) -> Tensor:
            fresh = torch.randn(
                size, channels, CHUNK, height, width, generator=generator, device=generator.device
            )
            if chunk:
                return fresh
            mask = imprinted.view(-1, 1, 1, 1, 1)
            return torch.where(mask, imprint(fresh, batch.placement), fresh)

        latents = noise(tied)
        always, never = torch.ones_like(tied), torch.zeros_like(tied)
        inputs = []
        for step, sigma in enumerate(LEVELS):
            if step:
                # Only the second step's noise decides the layout: see COUPLED_ABOVE.
                latents = torch.lerp(latents, noise(always if step == 1 else never), sigma)
            inputs.append(latents.to(self.run.dtype))
            latents = latents - sigma * self._velocity(chunk, latents, sigma, text, attend)
        return torch.stack(inputs), latents


def distillation_loss(
    losses: Losses, experience: Experience, generator: torch.Generator
) -> Tensor:
    """Weighted mean squared error of clean latents, one random step per chunk."""
    latents = experience.batch.latents.float()
    size, frames = latents.shape[0], latents.shape[2]
    device = generator.device
    step = torch.randint(len(LEVELS), (size, frames // CHUNK), generator=generator, device=device)
    sigma = torch.tensor(LEVELS, device=device)[step]
    weight = torch.tensor(_LEVEL_WEIGHTS, device=device)[step]
    # From a first noise that stands for no placement, there is no right answer.
    undecided = (step[:, 0] == 0) & ~experience.first_step_tied
    weight[:, 0] = torch.where(undecided, 0.0, weight[:, 0])
    per_frame_step = step.repeat_interleave(CHUNK, dim=1)
    noisy = experience.inputs.gather(
        0, per_frame_step[None, :, None, :, None, None].expand(1, *experience.inputs.shape[1:])
    )[0]
    dtype = losses.run.dtype
    rows = losses.text(experience.batch.rows)
    if frames == CHUNK:
        velocity = losses.opening_velocity(noisy, sigma, rows)
    else:
        velocity = losses.clip_velocity(experience.results.to(dtype), noisy, sigma, rows)
    clean = noisy.float() - broadcast(sigma) * velocity.float()
    return (broadcast(weight) * (clean - latents).square()).mean()


def train_student(run: Run, model: WanModel, losses: Losses, clips: Batch, openings: Batch,
                  save: Callable[[dict[str, Tensor]], None]) -> WanModel:  # fmt: skip
    """Train in place; the model ends as the averaged weights."""
    sizes, generator = run.sizes, run.generator(30)
    optimizer = MasterOptimizer(model)
    student = Student(run, model, losses.positions)
    clock = run.clock()
    recent: list[Tensor] = []
    last_saved = 0.0
    going = True
    while going:
        batch = clips.sample(sizes.rollout_clips, generator)
        long = student.roll_out(batch, losses.text(batch.rows), generator)
        parts = [
            slice(start, start + sizes.batch_clips)
            for start in range(0, sizes.rollout_clips, sizes.batch_clips)
        ]
        for members in parts * _PASSES_PER_ROLLOUT:
            batch = openings.sample(sizes.batch_openings, generator)
            short = student.roll_out(batch, losses.text(batch.rows), generator)
            loss_clips = distillation_loss(losses, long.part(members), generator)
            loss_clips.backward()
            loss_openings = distillation_loss(losses, short, generator)
            loss_openings.backward()
            optimizer.step(learning_rate(_PEAK_RATE, clock.used))
            recent.append(torch.stack([loss_clips.detach(), loss_openings.detach()]))
            going = clock.tick()
            if clock.step == 2 and run.fast:
                run.log.write("distil_compiled", used=clock.used)
                clock.restart()
            if clock.step % 50 == 0 or not going:
                clip_loss, opening_loss = torch.stack(recent).mean(0).tolist()
                error = (long.results - long.batch.latents.float()).square().mean((0, 1, 3, 4))
                run.log.write(
                    "distil",
                    step=clock.step,
                    used=clock.used,
                    loss_clips=clip_loss,
                    loss_openings=opening_loss,
                    error_first_chunk=error[:CHUNK].mean().item(),
                    error_last_chunk=error[-CHUNK:].mean().item(),
                )
                recent.clear()
            if clock.used * clock.seconds - last_saved > _SAVE_EVERY_SECONDS:
                last_saved = clock.used * clock.seconds
                save(optimizer.averaged())
            if not going:
                break
    model.load_state_dict({k: v.to(run.dtype) for k, v in optimizer.averaged().items()})
    return model


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m lightforcing.training.distil --autoencoder FILE --resume TEACHER --out FILE`."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser, seconds=420)
    parser.add_argument("--autoencoder", type=Path, required=True)
    arguments = parser.parse_args(argv)
    run = run_from_arguments(arguments)
    model, losses, prompt_rows = prepare(run, arguments.resume)
    clips, openings = load_pools(run, arguments.autoencoder, prompt_rows)

    def save(tensors: dict[str, Tensor]) -> None:
        save_weights(arguments.out, tensors, torch.bfloat16, file_metadata(run.sizes))

    train_student(run, model, losses, clips, openings, save)
    save(model.state_dict())


if __name__ == "__main__":
    main()
