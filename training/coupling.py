"""Tying the noise of a video's first chunk to where things are in it.

A prompt leaves open where its objects start. A diffusion model lets the noise decide, by a map it
finds itself, and a few-step student must then imitate that map. Here the map is chosen instead:
`imprint` makes a few projections of the noise equal to the scene's `placement`. Placement is
standard normal and the projections are orthonormal, so the imprinted noise is exactly standard
normal noise: nothing changes for whoever samples, but the pair (noise, video) is now a function of
the noise and the prompt, and learning it is plain regression without blur.

The projection is onto the finest checkerboard of one channel, summed over the chunk: inside a
2 x 2 patch it is linear for the patch embedding, it needs no position, and smooth latents have
next to none of it, so a rest of the picture in the noisy latents does not disturb it.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Above this noise level the placement is read from the noise; below it the picture shows it. After
# re-noising to 0.9375 the old picture is too faint to locate anything, at 0.8333 it is not.
COUPLED_ABOVE = 0.9


def _checkerboard(noise: Tensor) -> Tensor:
    """[F, h, w] of +-1 / sqrt(F h w)."""
    frames, height, width = noise.shape[-3:]
    rows = torch.arange(height, device=noise.device)[:, None]
    columns = torch.arange(width, device=noise.device)[None, :]
    signs = 1.0 - 2.0 * ((rows + columns) % 2)
    return signs.expand(frames, -1, -1) / (frames * height * width) ** 0.5


def project(noise: Tensor, dims: int) -> Tensor:
    """Placement that some noise stands for: [B, C, F, h, w] -> [B, dims], dims <= C."""
    return torch.einsum("bcfhw,fhw->bc", noise[:, :dims], _checkerboard(noise))


def imprint(noise: Tensor, placement: Tensor) -> Tensor:
    """Noise that stands for a placement.

    Args:
        noise: standard normal [B, C, F, h, w] of a first chunk.
        placement: standard normal [B, dims], dims <= C.

    Returns:
        [B, C, F, h, w], again standard normal if both were, independently.
    """
    dims = placement.shape[1]
    missing = placement - project(noise, dims)
    change = missing[:, :, None, None, None] * _checkerboard(noise)
    return torch.cat([noise[:, :dims] + change, noise[:, dims:]], dim=1)
