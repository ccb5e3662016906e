"""Building blocks of the Wan 2.1 VAE: causal in time, with the streaming state passed in and out.

All of them take and return features [B, C, T, H, W]. What a block must remember of earlier calls
comes from a `FeatureCursor` and goes back to it in the same order, so a network's state is one flat
list and the blocks hold weights only.

Reference: the published Wan 2.1 VAE (Wan-Video, Apache-2.0); own implementation. Deviations:
published code processes one latent frame per call and grows its caches from nothing; here any
number of frames runs in one call and a cache starts as zeros, which is the same arithmetic.
Normalisation sums squares in float32 in every dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CACHED_FRAMES = 2  # a causal kernel of three frames looks two frames back
_NORM_EPS = 1e-12


class FeatureCursor:
    """Hands each block its cached features and collects the new ones, in network order.

    Args:
        old: what `new` held after the call for the frames before; None at the start of a stream.
    """

    def __init__(self, old: Sequence[Tensor] | None) -> None:
        self._old = old
        self.new: list[Tensor] = []

    @property
    def at_start(self) -> bool:
        """Whether this call holds the first frame of the stream."""
        return self._old is None

    def prepend(self, features: Tensor, frames: int, *, skip: int = 0) -> Tensor:
        """Put the cached frames before `features` and cache the last ones for the next call.

        Args:
            features: [B, C, T, H, W].
            frames: how many frames to cache.
            skip: how many leading frames of `features` do not belong to this cache's history; at
                the start of a stream the frames before the first one that does are zeros.

        Returns:
            [B, C, frames + T - skip, H, W].
        """
        if self._old is None:
            batch, channels, _, height, width = features.shape
            past = features.new_zeros(batch, channels, frames, height, width)
        else:
            past = self._old[len(self.new)]
        extended = torch.cat([past, features[:, :, skip:]], dim=2)
        # A copy, because a view would keep the whole chunk's features alive between calls.
        self.new.append(extended[:, :, -frames:].clone())
        return extended


def _per_frame(layer: nn.Module, features: Tensor) -> Tensor:
    """Apply a 2-D layer to every frame of [B, C, T, H, W]."""
    batch, _, time = features.shape[:3]
    images = features.transpose(1, 2).flatten(0, 1)
    return layer(images).unflatten(0, (batch, time)).transpose(1, 2)


class CausalConv3d(nn.Conv3d):
    """3x3x3 convolution that sees its own and the two earlier frames."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=(0, 1, 1))

    def forward(self, features: Tensor, cursor: FeatureCursor) -> Tensor:
        return super().forward(cursor.prepend(features, _CACHED_FRAMES))


class ChannelNorm(nn.Module):
    """Scale every position's channel vector to the length sqrt(C), then by a learned gain.

    Args:
        channels: C.
        spatial_dims: trailing dimensions of the input, 2 or 3; only the gain's shape depends on it.
    """

    def __init__(self, channels: int, spatial_dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * spatial_dims))

    def forward(self, features: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=torch.float32)
        scale = features.shape[1] ** 0.5 / norm.clamp_min(_NORM_EPS)
        # float16 has no room for the factor of a zero vector, and zero times infinity is NaN.
        scale = scale.clamp_max(torch.finfo(features.dtype).max).to(features.dtype)
        return features * scale * self.gamma


class ResidualBlock(nn.Module):
    """Two causal convolutions around a shortcut, each after normalisation and SiLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        # The published names leave a gap at 5, where training had a dropout.
        self.residual = nn.ModuleDict(
            {
                "0": ChannelNorm(in_channels, 3),
                "2": CausalConv3d(in_channels, out_channels),
                "3": ChannelNorm(out_channels, 3),
                "6": CausalConv3d(out_channels, out_channels),
            }
        )
        self.shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv3d(in_channels, out_channels, 1)
        )

    def forward(self, features: Tensor, cursor: FeatureCursor) -> Tensor:
        hidden = F.silu(self.residual["0"](features))
        hidden = self.residual["2"](hidden, cursor)
        hidden = F.silu(self.residual["3"](hidden))
        return self.residual["6"](hidden, cursor) + self.shortcut(features)


class FrameAttention(nn.Module):
    """Single-head self-attention among the positions of one frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def _attend(self, images: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(images)).flatten(2).transpose(1, 2).unsqueeze(1)
        query, key, value = qkv.chunk(3, dim=-1)  # [B*T, 1, H*W, C]
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.squeeze(1).transpose(1, 2).reshape(images.shape))

    def forward(self, features: Tensor, cursor: FeatureCursor) -> Tensor:
        return features + _per_frame(self._attend, features)


class Upsampler(nn.Module):
    """Double the height and width, and the frame rate where `temporal`.

    The first frame of a stream stays one frame and is no part of the time convolution's history;
    every other frame becomes two.
    """

    def __init__(self, in_channels: int, out_channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(in_channels, out_channels, 3, padding=1)})
        self.time_conv = nn.Conv3d(in_channels, 2 * in_channels, (3, 1, 1)) if temporal else None

    def _grow(self, features: Tensor, cursor: FeatureCursor) -> Tensor:
        first = 1 if cursor.at_start else 0
        extended = cursor.prepend(features, _CACHED_FRAMES, skip=first)
        if extended.shape[2] == _CACHED_FRAMES:
            return features
        pairs = self.time_conv(extended).unflatten(1, (2, -1))  # [B, 2, C, T, H, W]
        grown = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        return torch.cat([features[:, :, :first], grown], dim=2)

    def _enlarge(self, images: Tensor) -> Tensor:
        return self.resample["1"](F.interpolate(images, scale_factor=2.0, mode="nearest"))

    def forward(self, features: Tensor, cursor: FeatureCursor) -> Tensor:
        if self.time_conv is not None:
            features = self._grow(features, cursor)
        return _per_frame(self._enlarge, features)


class Downsampler(nn.Module):
    """Halve the height and width, and the frame rate where `temporal`.

    The first frame of a stream passes the time convolution unchanged; after it every two frames
    become one, which also sees the frame before them.
    """

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        self.time_conv = (
            nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None
        )

    def _reduce(self, images: Tensor) -> Tensor:
        return self.resample["1"](F.pad(images, (0, 1, 0, 1)))

    def forward(self, features: Tensor, cursor: FeatureCursor) -> Tensor:
        features = _per_frame(self._reduce, features)
        if self.time_conv is None:
            return features
        if not cursor.at_start:
            return self.time_conv(cursor.prepend(features, 1))
        # The zeros put before the first frame serve no kernel here.
        extended = cursor.prepend(features, 1)[:, :, 1:]
        if extended.shape[2] == 1:
            return extended
        return torch.cat([extended[:, :, :1], self.time_conv(extended)], dim=2)
