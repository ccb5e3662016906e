"""Mean and standard deviation of Wan 2.1 latents, and the conversions made with them.

A diffusion model works on normalised latents; the Wan VAE's own are denormalised.

Reference: the constants published with the Wan 2.1 VAE.
"""

from __future__ import annotations

import torch
from torch import Tensor

LATENT_CHANNELS = 16

# fmt: off
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
# fmt: on


def latent_statistics(like: Tensor, channel_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation in float32, shaped to apply to tensors of `like`'s dimensions.

    Copies from the host, which waits for the GPU: not for every chunk where that matters.
    """
    shape = [1] * like.ndim
    shape[channel_dim] = LATENT_CHANNELS
    mean, std = torch.tensor((LATENT_MEAN, LATENT_STD), device=like.device).reshape(2, *shape)
    return mean, std


def denormalise_latents(latents: Tensor, channel_dim: int = 1) -> Tensor:
    """Diffusion latents -> VAE latents, computed in float32, same dtype out.

    Args:
        latents: 16 channels in dimension `channel_dim`, any other dimensions.
        channel_dim: which dimension holds the channels.
    """
    mean, std = latent_statistics(latents, channel_dim)
    return (latents.float() * std + mean).to(latents.dtype)


def normalise_latents(latents: Tensor, channel_dim: int = 1) -> Tensor:
    """VAE latents -> diffusion latents; the inverse of `denormalise_latents`."""
    mean, std = latent_statistics(latents, channel_dim)
    return ((latents.float() - mean) / std).to(latents.dtype)
