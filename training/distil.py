"""Stage 3: distillation to four steps on the student's own rollouts.

The student makes videos exactly as the engine does: chunk by chunk through the key/value cache,
four steps each, re-noised in between, a clean pass after each chunk. Because a scene follows from
its prompt and its placement, and the noise stands for the placement (`coupling.py`), the right
result of such a rollout is known: the rendered clip. So every input the student met is an example:
from this noisy chunk, with your own earlier chunks as the past, the answer is the true latents.

First chunks are trained by themselves, in larger numbers. The layout is decided by the noise of the
second step; the first step's result, re-noised, is only a disturbance there, and the student must
learn to look past it. Later steps refine what the second one made. Where that is not the true
layout, the truth is no answer to it (imitating it would teach to blur and to drop objects): there
the rollout goes on from the truth instead.

All chunks of a clip are trained in one teacher-forced pass, with the student's own results as its
clean stream and, per chunk, the noisy input of one of the four steps.
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
from .compiled import compiled_blocks
from .coupling import imprint
from .denoiser import LEVELS, Positions, broadcast, file_metadata
from .optimizer import MasterOptimizer
from .pool import CHUNK, Batch
from .teacher import Losses, hidden_matrix, load_pools, prepare

_PEAK_RATE = 3e-3
_LEVEL_WEIGHTS = (0.5, 1.0, 1.5, 3.0)  # what the last step makes is what is seen
# How often each step is trained: in openings, in first chunks of clips, in later chunks.
_OPENING_CHANCES = (0.1, 0.5, 0.2, 0.2)
_FIRST_CHANCES = (0.0, 0.0, 0.5, 0.5)
_LATER_CHANCES = (0.2, 0.2, 0.2, 0.4)
_FOUND_ERROR = 0.08  # mean squared error of latents below which the student found the layout
_PASSES_PER_ROLLOUT = 2
_SAVE_EVERY_SECONDS = 60.0


@dataclass(frozen=True)
class Experience:
    """What the student met and made in rollouts of a batch.

    Attributes:
        batch: the true clips.
        inputs: noisy latents per step, [steps, B, 16, F, h, w].
        results: the student's clips, [B, 16, F, h, w].
        chances: how often each step is to be trained, [B, chunks, steps]; 0 where there is no
            right answer.
    """

    batch: Batch
    inputs: Tensor
    results: Tensor
    chances: Tensor

    def part(self, members: slice) -> Experience:
        """Some of the clips."""
        batch = Batch(
            self.batch.latents[members], self.batch.rows[members], self.batch.placement[members]
        )
        return Experience(
            batch, self.inputs[:, members], self.results[members], self.chances[members]
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
        """Generate clips as sampling does; first chunks start at the third step, from the truth."""
        shape = batch.latents.shape
        text = prepare_text(self.model, text_rows)
        attend = CachedAttention(self._cache(shape))
        inputs, results = [], []
        for chunk, first in enumerate(range(0, shape[2], CHUNK)):
            attend.cache.enter(range(first, first + CHUNK))

            def velocity(latents: Tensor, sigma: float, chunk: int = chunk) -> Tensor:
                return self._velocity(chunk, latents, sigma, text, attend)

            truth = batch.latents[:, :, first : first + CHUNK].float() if chunk == 0 else None
            met, made = self._denoise(velocity, shape, truth, generator)
            inputs.append(met)
            results.append(made)
            if first + CHUNK < shape[2]:
                velocity(made, 0.0)
                attend.cache.commit()
        chances = torch.tensor(_LATER_CHANCES, device=generator.device)
        chances = chances.repeat(shape[0], shape[2] // CHUNK, 1)
        chances[:, 0] = torch.tensor(_FIRST_CHANCES, device=generator.device)
        return Experience(batch, torch.cat(inputs, dim=3), torch.cat(results, dim=2), chances)

    def _denoise(
        self,
        velocity: Callable[[Tensor, float], Tensor],
        shape: torch.Size,
        truth: Tensor | None,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Inputs of the four steps [steps, B, 16, CHUNK, h, w] and the result.

        With `truth` given, the first two steps are taken to have found it.
        """
        size = (shape[0], shape[1], CHUNK, *shape[3:])
        latents = torch.zeros(size, device=generator.device) if truth is None else truth
        inputs = []
        for step, sigma in enumerate(LEVELS):
            noise = torch.randn(size, generator=generator, device=generator.device)
            noisy = torch.lerp(latents, noise, sigma)
            inputs.append(noisy.to(self.run.dtype))
            if truth is None or step >= 2:
                latents = noisy - sigma * velocity(noisy, sigma)
        return torch.stack(inputs), latents

    @torch.no_grad()
    def meet_openings(self, losses: Losses, batch: Batch, generator: torch.Generator) -> Experience:
        """First chunks from pure noise; where the layout was missed, later steps get the truth."""
        truth = batch.latents.float()
        text = losses.text(batch.rows)
        tied_first = torch.rand(len(batch), generator=generator, device=generator.device) < 0.5
        latents = torch.zeros_like(truth)
        inputs = []
        for step, sigma in enumerate(LEVELS):
            noise = torch.randn(truth.shape, generator=generator, device=generator.device)
            tied = imprint(noise, batch.placement)
            if step == 0:
                noise = torch.where(tied_first.view(-1, 1, 1, 1, 1), tied, noise)
            elif step == 1:
                noise = tied
            noisy = torch.lerp(latents, noise, sigma)
            inputs.append(noisy.to(self.run.dtype))
            if step == len(LEVELS) - 1:
                break
            level = torch.full((len(batch), 1), sigma, device=generator.device)
            latents = noisy - sigma * losses.opening_velocity(inputs[-1], level, text).float()
            if step:
                error = (latents - truth).square().mean((1, 2, 3, 4), keepdim=True)
                latents = torch.where(error < _FOUND_ERROR, latents, truth)
        chances = torch.tensor(_OPENING_CHANCES, device=generator.device).repeat(len(batch), 1, 1)
        # From a first noise that stands for no placement, there is no right answer.
        chances[:, 0, 0] *= tied_first
        return Experience(batch, torch.stack(inputs), latents, chances)

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


def distillation_loss(losses: Losses, experience: Experience, generator: torch.Generator) -> Tensor:
    """Weighted mean squared error of clean latents, one random step per chunk."""
    latents = experience.batch.latents.float()
    size, frames = latents.shape[0], latents.shape[2]
    step = torch.multinomial(experience.chances.flatten(0, 1), 1, generator=generator)
    step = step.view(size, frames // CHUNK)
    sigma = torch.tensor(LEVELS, device=generator.device)[step]
    weight = torch.tensor(_LEVEL_WEIGHTS, device=generator.device)[step]
    per_frame_step = step.repeat_interleave(CHUNK, dim=1)
    noisy = experience.inputs.gather(
        0, per_frame_step[None, :, None, :, None, None].expand(1, *experience.inputs.shape[1:])
    )[0]
    rows = losses.text(experience.batch.rows)
    if frames == CHUNK:
        velocity = losses.opening_velocity(noisy, sigma, rows)
    else:
        past = experience.results.to(losses.run.dtype)
        velocity = losses.clip_velocity(past, noisy, sigma, rows)
    clean = noisy.float() - broadcast(sigma) * velocity.float()
    return (broadcast(weight) * (clean - latents).square()).mean()


def train_student(run: Run, model: WanModel, losses: Losses, clips: Batch, openings: Batch,
                  save: Callable[[dict[str, Tensor]], None]) -> WanModel:  # fmt: skip
    """Train in place; the model ends as the averaged weights."""
    sizes, generator = run.sizes, run.generator(30)
    optimizer = MasterOptimizer(model, use_muon=hidden_matrix)
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
            short = student.meet_openings(losses, batch, generator)
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
            if clock.spent - last_saved > _SAVE_EVERY_SECONDS:
                last_saved = clock.spent
                if run.rank == 0:
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

    with compiled_blocks(run.fast):
        train_student(run, model, losses, clips, openings, save)
    if run.rank == 0:
        save(model.state_dict())


if __name__ == "__main__":
    main()
