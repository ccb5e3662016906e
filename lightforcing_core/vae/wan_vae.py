"""The Wan 2.1 video autoencoder and its pruned form LightVAE, with explicit streaming state.

One class for both: the widths are read from the tensors, whose names are the published ones. A
video of 1 + 4 k pixel frames is 1 + k latent frames at an eighth of the size; latent frame 0 is
pixel frame 0, latent frame t is pixel frames 4 t - 3 .. 4 t.

Reference: the published Wan 2.1 VAE (Wan-Video, Apache-2.0) and LightVAE (ModelTC); own
implementation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .latent_stats import LATENT_CHANNELS, denormalise_latents, normalise_latents
from .wan_vae_modules import (
    CausalConv3d,
    ChannelNorm,
    Downsampler,
    FeatureCursor,
    FrameAttention,
    ResidualBlock,
    Upsampler,
)
from .weights import describe_problems, load_exactly, require_shapes

FRAMES_PER_LATENT = 4
SPATIAL_SCALE = 8

_IMAGE_CHANNELS = 3
_ENCODER_BLOCKS = 2  # residual blocks per stage
_DECODER_BLOCKS = 3
_ENCODER_TEMPORAL = (False, True, True)  # which of the three downsamplers halve the frame rate
_DECODER_TEMPORAL = (True, True, False)
_DO = "give Wan2.1_VAE.pth, wan_2.1_vae.safetensors or a lightvaew2_1 file"

Widths5 = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class WanVAEConfig:
    """Channel counts of one Wan VAE.

    Args:
        decoder_widths: after the first convolution and of each of the four stages.
        upsampled_widths: after each of the three upsamplers.
        encoder_widths: as `decoder_widths`; None for a file that holds a decoder only.
    """

    decoder_widths: Widths5
    upsampled_widths: tuple[int, int, int]
    encoder_widths: Widths5 | None

    @classmethod
    def from_dim(cls, dim: int) -> WanVAEConfig:
        """The published shape at a base width: 96 is Wan 2.1, 24 is LightVAE."""
        wide, middle = 4 * dim, 2 * dim
        return cls(
            decoder_widths=(wide, wide, wide, middle, dim),
            upsampled_widths=(middle, middle, dim),
            encoder_widths=(dim, dim, middle, wide, wide),
        )

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor]) -> WanVAEConfig:
        """Read the channel counts from tensors under the published names.

        Raises:
            UserError: a tensor that decides a width is missing or no convolution, or the latents
                have not 16 channels.
        """
        decoder = ["decoder.conv1.weight"]
        decoder += [f"decoder.upsamples.{4 * i}.residual.6.weight" for i in range(4)]
        upsampled = [f"decoder.upsamples.{4 * i + 3}.resample.1.weight" for i in range(3)]
        encoder = ["encoder.conv1.weight"]
        encoder += [f"encoder.downsamples.{3 * i}.residual.6.weight" for i in range(4)]
        has_encoder = any(name.startswith("encoder.") for name in tensors)
        needed = decoder + upsampled + (encoder if has_encoder else [])
        absent = [f"missing {name}" for name in needed if name not in tensors]
        if absent:
            raise UserError(f"not a Wan 2.1 VAE state dict: {describe_problems(absent)}; {_DO}")
        # Those that enlarge work on pictures, the others on video.
        dims = {name: 4 if name in upsampled else 5 for name in needed}
        require_shapes(tensors, dims, do=_DO)
        channels = tensors[decoder[0]].shape[1]
        if channels != LATENT_CHANNELS:
            raise UserError(
                f"this VAE has {channels} latent channels, Wan 2.1 has {LATENT_CHANNELS}; "
                "give a VAE made for Wan 2.1"
            )
        return cls(
            decoder_widths=tuple(tensors[name].shape[0] for name in decoder),
            upsampled_widths=tuple(tensors[name].shape[0] for name in upsampled),
            encoder_widths=tuple(tensors[name].shape[0] for name in encoder)
            if has_encoder
            else None,
        )


@dataclass(frozen=True)
class WanVAEState:
    """What a decoder or an encoder must remember between two calls.

    Args:
        features: per causal convolution the last one or two frames of its input.
        latents_seen: latent frames processed so far.
    """

    features: tuple[Tensor, ...]
    latents_seen: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All there is to remember."""
        return self.features


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        [
            ResidualBlock(channels, channels),
            FrameAttention(channels),
            ResidualBlock(channels, channels),
        ]
    )


def _head(in_channels: int, out_channels: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {"0": ChannelNorm(in_channels, 3), "2": CausalConv3d(in_channels, out_channels)}
    )


class _Decoder(nn.Module):
    def __init__(self, widths: Widths5, upsampled: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(LATENT_CHANNELS, widths[0])
        self.middle = _middle(widths[0])
        layers: list[nn.Module] = []
        for stage, (start, width) in enumerate(
            zip((widths[0], *upsampled), widths[1:], strict=True)
        ):
            layers.append(ResidualBlock(start, width))
            layers += [ResidualBlock(width, width) for _ in range(_DECODER_BLOCKS - 1)]
            if stage < len(upsampled):
                temporal = _DECODER_TEMPORAL[stage]
                layers.append(Upsampler(width, upsampled[stage], temporal=temporal))
        self.upsamples = nn.ModuleList(layers)
        self.head = _head(widths[-1], _IMAGE_CHANNELS)

    def forward(self, features: Tensor, cursor: FeatureCursor) -> Tensor:
        features = self.conv1(features, cursor)
        for layer in (*self.middle, *self.upsamples):
            features = layer(features, cursor)
        return self.head["2"](F.silu(self.head["0"](features)), cursor)


class _Encoder(nn.Module):
    def __init__(self, widths: Widths5) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(_IMAGE_CHANNELS, widths[0])
        layers: list[nn.Module] = []
        for stage, (start, width) in enumerate(pairwise(widths)):
            layers.append(ResidualBlock(start, width))
            layers += [ResidualBlock(width, width) for _ in range(_ENCODER_BLOCKS - 1)]
            if stage < len(_ENCODER_TEMPORAL):
                layers.append(Downsampler(width, temporal=_ENCODER_TEMPORAL[stage]))
        self.downsamples = nn.ModuleList(layers)
        self.middle = _middle(widths[-1])
        # Twice the latent channels: mean and log-variance of the posterior.
        self.head = _head(widths[-1], 2 * LATENT_CHANNELS)

    def forward(self, features: Tensor, cursor: FeatureCursor) -> Tensor:
        features = self.conv1(features, cursor)
        for layer in (*self.downsamples, *self.middle):
            features = layer(features, cursor)
        return self.head["2"](F.silu(self.head["0"](features)), cursor)


class WanVAE(nn.Module):
    """Wan 2.1 VAE or LightVAE. Latents are normalised at this edge, pixels are in [-1, 1].

    Args:
        config: the channel counts; `WanVAEConfig.from_dim(96)` is the published Wan 2.1.
    """

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        self.config = config
        if config.encoder_widths is None:
            self.encoder = None
        else:
            self.encoder = _Encoder(config.encoder_widths)
            self.conv1 = nn.Conv3d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1)
        self.conv2 = nn.Conv3d(LATENT_CHANNELS, LATENT_CHANNELS, 1)
        self.decoder = _Decoder(config.decoder_widths, config.upsampled_widths)

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor]) -> WanVAE:
        """Build the network that fits a state dict and load it, in the tensors' own dtype.

        Args:
            tensors: a Wan 2.1 VAE or LightVAE state dict; `encoder.*` and `conv1.*` may be absent.

        Raises:
            UserError: it is no such state dict, or tensors are missing, unexpected or misfit.
        """
        config = WanVAEConfig.from_state_dict(tensors)
        if config.encoder_widths is None:
            # Decoder-only files may keep the encoder's last 1x1x1 layer; nothing can use it.
            tensors = {k: v for k, v in tensors.items() if not k.startswith("conv1.")}
        with torch.device("meta"):
            model = cls(config).to(dtype=tensors["decoder.conv1.weight"].dtype)
        load_exactly(
            model,
            tensors,
            what="Wan VAE",
            do=_DO,
        )
        return model

    def decode(
        self, latents: Tensor, state: WanVAEState | None = None
    ) -> tuple[Tensor, WanVAEState]:
        """Decode consecutive latent frames; all of them in one pass.

        Args:
            latents: normalised, [B, 16, T, h, w], T >= 1, in the network's dtype.
            state: what the call for the frames before returned; None at the start of a stream.

        Returns:
            Pixels [B, 3, t, 8 h, 8 w], nominally in [-1, 1] and not clamped, with t = 1 + 4 (T - 1)
            at the start of a stream and 4 T later; and the new state. Any split of a stream into
            calls gives the same pixels.

        Raises:
            ValueError: the shape is not as above.
        """
        if latents.ndim != 5 or latents.shape[1] != LATENT_CHANNELS or latents.shape[2] < 1:
            raise ValueError(
                f"latents must be [B, {LATENT_CHANNELS}, T, h, w], got {list(latents.shape)}"
            )
        cursor = FeatureCursor(state.features if state else None)
        pixels = self.decoder(self.conv2(denormalise_latents(latents)), cursor)
        seen = latents.shape[2] + (state.latents_seen if state else 0)
        return pixels, WanVAEState(tuple(cursor.new), seen)

    def encode(
        self, pixels: Tensor, state: WanVAEState | None = None
    ) -> tuple[Tensor, WanVAEState]:
        """Encode consecutive pixel frames to the mean of the posterior; all in one pass.

        Args:
            pixels: [B, 3, t, H, W] in [-1, 1], H and W multiples of 8, t = 1 + 4 k at the start of
                a stream and 4 k later, in the network's dtype.
            state: what the call for the frames before returned; None at the start of a stream.

        Returns:
            Normalised latents [B, 16, T, H / 8, W / 8] with T = 1 + k at the start of a stream and
            k later; and the new state. Any split of a stream gives the same latents.

        Raises:
            ValueError: the shape is not as above, or this network has no encoder.
        """
        if self.encoder is None:
            raise ValueError("this VAE file has no encoder; it can only decode")
        first = 0 if state else 1
        shape = pixels.shape
        if (
            pixels.ndim != 5
            or shape[1] != _IMAGE_CHANNELS
            or shape[2] < 1
            or shape[2] % FRAMES_PER_LATENT != first
            or shape[3] % SPATIAL_SCALE
            or shape[4] % SPATIAL_SCALE
        ):
            count = "1 + 4 k frames at the start of a stream" if first else "4 k frames here"
            raise ValueError(
                f"pixels must be [B, {_IMAGE_CHANNELS}, t, H, W] with {count} and H and W "
                f"multiples of {SPATIAL_SCALE}, got {list(shape)}"
            )
        cursor = FeatureCursor(state.features if state else None)
        posterior = self.conv1(self.encoder(pixels, cursor))
        latents = normalise_latents(posterior[:, :LATENT_CHANNELS])
        seen = latents.shape[2] + (state.latents_seen if state else 0)
        return latents, WanVAEState(tuple(cursor.new), seen)
