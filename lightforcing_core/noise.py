"""Gaussian noise that depends on the seed, the latent frame and the step, and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .errors import UserError


class NoiseSource(Protocol):
    """Where the rollout takes its noise from. Tensors are float32 [B, C, len(frames), h, w].

    Attributes:
        shape: batch, channels, latent height, latent width.
        device: where the noise is.
    """

    shape: tuple[int, int, int, int]
    device: torch.device

    def initial(self, frames: Sequence[int]) -> Tensor:
        """Noise a chunk starts from; `frames` are absolute latent frame indices."""
        ...

    def renoise(self, frames: Sequence[int], step: int) -> Tensor:
        """Noise added before denoising step `step` (1 for the second step of the list)."""
        ...


def check_seed(seed: int) -> int:
    """The seed if it is one.

    Raises:
        UserError: it does not fit 64 bits.
    """
    if not 0 <= seed < 2**64:
        raise UserError(f"the seed must be between 0 and 2^64 - 1, got {seed}")
    return seed


class SeededNoise:
    """The same noise on every device, for any chunk size and any length of video.

    Each latent frame and step has a counter-based stream of its own (Philox, keyed with the
    seed, the frame and the step) on the host, so a frame's noise does not depend on what was
    drawn before it. Self Forcing draws from the global generator instead (`ReleasedNoise`), and
    ComfyUI's AR sampler from seed + 1000 chunk + step (`NativeNoise`); neither survives another
    chunk size.
    """

    def __init__(
        self, seed: int, shape: tuple[int, int, int, int], device: torch.device | str = "cpu"
    ) -> None:
        """
        Args:
            seed: 0 .. 2^64 - 1.
            shape: batch, channels, latent height, latent width.
            device: where the noise is wanted.
        """
        self.seed = check_seed(seed)
        self.shape = shape
        self.device = torch.device(device)

    def _draw(self, frames: Sequence[int], step: int) -> Tensor:
        is_gpu = self.device.type == "cuda"
        # From pinned memory the copy waits for nothing, and the host goes on.
        noise = torch.empty(len(frames), *self.shape, pin_memory=is_gpu)
        for plane, frame in zip(noise, frames, strict=True):
            key = np.array([self.seed, frame << 16 | step], dtype=np.uint64)
            generator = np.random.Generator(np.random.Philox(key=key))
            generator.standard_normal(dtype=np.float32, out=plane.numpy())
        return noise.to(self.device, non_blocking=True).movedim(0, 2).contiguous()

    def initial(self, frames: Sequence[int]) -> Tensor:
        return self._draw(frames, 0)

    def renoise(self, frames: Sequence[int], step: int) -> Tensor:
        return self._draw(frames, step)


def _generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed % 2**64)


class NativeNoise:
    """The noise of ComfyUI's own AR sampler: a whole clip to start from, then a seed per step.

    Reference: ComfyUI `sample_ar_video`, which seeds the global generator with seed + 1000 chunk +
    step before every new draw.
    """

    def __init__(
        self, start: Tensor, seed: int, frames_per_chunk: int, *, given_frames: int = 0
    ) -> None:
        """
        Args:
            start: noise of all frames, given ones included, [B, C, F, h, w].
            seed: 0 .. 2^64 - 1.
            frames_per_chunk, given_frames: as in the rollout; chunks are counted by them.
        """
        batch, channels, _, height, width = start.shape
        self.shape = (batch, channels, height, width)
        self.device = start.device
        self._start = start.float()
        self._seed = check_seed(seed)
        self._frames_per_chunk = frames_per_chunk
        self._given_frames = given_frames

    def initial(self, frames: Sequence[int]) -> Tensor:
        return self._start[:, :, frames[0] : frames[-1] + 1]

    def renoise(self, frames: Sequence[int], step: int) -> Tensor:
        batch, channels, height, width = self.shape
        chunk = (frames[0] - self._given_frames) // self._frames_per_chunk
        return torch.randn(
            (batch, channels, len(frames), height, width),
            generator=_generator(self._seed + 1000 * chunk + step - 1, self.device),
            device=self.device,
        )


class ReleasedNoise:
    """The noise of Self Forcing's own script: one generator, drawn from in the order of use.

    A whole clip first, then every new draw of every chunk, all in bfloat16 and with frames before
    channels. The generator is the device's, so a GPU and a CPU make different videos, as theirs do.

    Reference: Self Forcing `inference.py` and `CausalInferencePipeline.inference`.
    """

    def __init__(
        self,
        seed: int,
        shape: tuple[int, int, int, int],
        num_frames: int,
        device: torch.device | str = "cpu",
        *,
        given_frames: int = 0,
    ) -> None:
        """
        Args:
            seed: 0 .. 2^64 - 1.
            shape: batch, channels, latent height, latent width.
            num_frames: latent frames to generate.
            device: whose generator is used, and where the noise is wanted.
            given_frames: latent frames before those, for which nothing is drawn.
        """
        self.shape = shape
        self.device = torch.device(device)
        self._given_frames = given_frames
        self._generator = _generator(check_seed(seed), self.device)
        self._start = self._draw(num_frames)

    def _draw(self, frames: int) -> Tensor:
        batch, channels, height, width = self.shape
        noise = torch.randn(
            (batch, frames, channels, height, width),
            generator=self._generator,
            device=self.device,
            dtype=torch.bfloat16,
        )
        return noise.transpose(1, 2).float()

    def initial(self, frames: Sequence[int]) -> Tensor:
        first = frames[0] - self._given_frames
        return self._start[:, :, first : first + len(frames)]

    def renoise(self, frames: Sequence[int], step: int) -> Tensor:
        """The next draw; asking again gives another one."""
        return self._draw(len(frames))


class PartialNoise:
    """Another noise, mixed into a video to start from: sigma noise + (1 - sigma) latents."""

    def __init__(self, noise: NoiseSource, latents: Tensor, sigma: float) -> None:
        """
        Args:
            noise: what is mixed in, and what every later step takes.
            latents: normalised, of all frames, [B, C, F, h, w], on the noise's device.
            sigma: noise level of the first step, 0..1.
        """
        self.shape = noise.shape
        self.device = noise.device
        self._noise = noise
        self._latents = latents
        self._sigma = sigma

    def initial(self, frames: Sequence[int]) -> Tensor:
        clean = self._latents[:, :, frames[0] : frames[-1] + 1].float()
        return self._sigma * self._noise.initial(frames) + (1 - self._sigma) * clean

    def renoise(self, frames: Sequence[int], step: int) -> Tensor:
        return self._noise.renoise(frames, step)
