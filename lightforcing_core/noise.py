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
    drawn before it. Self Forcing draws from the global generator instead, and ComfyUI's AR
    sampler from seed + 1000 chunk + step; neither survives another chunk size.
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
        planes = []
        for frame in frames:
            key = np.array([self.seed, frame << 16 | step], dtype=np.uint64)
            generator = np.random.Generator(np.random.Philox(key=key))
            planes.append(generator.standard_normal(self.shape, dtype=np.float32))
        return torch.from_numpy(np.stack(planes, axis=2)).to(self.device)

    def initial(self, frames: Sequence[int]) -> Tensor:
        return self._draw(frames, 0)

    def renoise(self, frames: Sequence[int], step: int) -> Tensor:
        return self._draw(frames, step)
