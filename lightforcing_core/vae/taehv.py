"""TAEHV, the tiny video autoencoder family, with explicit streaming state.

One class for every file of the family that fits Wan 2.1 latents: taew2_1, lighttaew2_1 and the
small autoencoder of the embedded model. Widths are read from the tensors; tensor names are the
published ones (`encoder.0` .. `encoder.17`, `decoder.1` .. `decoder.22`).

The network is two-dimensional convolutions only. Time enters in three ways: a `MemBlock` sees the
previous frame of its own input, `TPool` joins two frames into one, `TGrow` splits one frame into
two. So the whole streaming state is one frame per `MemBlock`, and any number of latent frames can
be processed in one call.

Reference: the TAEHV family by Ollin Boer Bohan (MIT licence); own implementation of the published
architecture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .weights import load_exactly, require_shapes

FRAMES_PER_LATENT = 4
FRAMES_TO_TRIM = FRAMES_PER_LATENT - 1
SPATIAL_SCALE = 8

_BLOCKS_PER_STAGE = 3
_DECODER_STAGES = (3, 9, 15)  # index of the first MemBlock of each stage
_DECODER_TIME_STRIDES = (1, 2, 2)
_ENCODER_STAGES = (4, 9, 14)
_ENCODER_TIME_STRIDES = (2, 2, 1)
_MEM_BLOCKS = _BLOCKS_PER_STAGE * len(_DECODER_STAGES)
_LATENT_LIMIT = 3.0
_DO = "give a complete file of the TAEHV family (taew2_1, lighttaew2_1)"


@dataclass(frozen=True)
class TAEHVConfig:
    """Sizes of one TAEHV network.

    Args:
        decoder_widths: channels after the first convolution and after each of the three stages.
        encoder_width: channels of the encoder; None for a file that holds a decoder only.
        latent_channels: channels of a latent frame.
        image_channels: channels of a pixel frame.

    Raises:
        ValueError: a width is not positive, or there are not four decoder widths.
    """

    decoder_widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    encoder_width: int | None = 64
    latent_channels: int = 16
    image_channels: int = 3

    def __post_init__(self) -> None:
        widths = self.decoder_widths
        if len(widths) != 4 or min(widths) < 1:
            raise ValueError(f"decoder_widths must be four positive channel counts, got {widths}")
        if self.encoder_width is not None and self.encoder_width < 1:
            raise ValueError(f"encoder_width must be positive or None, got {self.encoder_width}")
        if min(self.latent_channels, self.image_channels) < 1:
            raise ValueError(
                "latent_channels and image_channels must be positive, got "
                f"{self.latent_channels} and {self.image_channels}"
            )

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor]) -> TAEHVConfig:
        """Read the sizes from tensors under the published names.

        Args:
            tensors: a TAEHV state dict; the encoder may be absent.

        Raises:
            UserError: the decoder's convolutions are missing, are not 4-D, or have sizes that no
                network has.
        """
        needed = [f"decoder.{index}.weight" for index in (1, 8, 14, 20, 22)]
        absent = [name for name in needed if name not in tensors or tensors[name].ndim != 4]
        if absent:
            raise UserError(
                f"not a TAEHV state dict: {', '.join(absent)} missing or not a 2-D convolution; "
                "give a file of the TAEHV family (taew2_1, lighttaew2_1)"
            )
        names = [*needed, *(["encoder.0.weight"] if "encoder.0.weight" in tensors else [])]
        require_shapes(tensors, dict.fromkeys(names, 4), do=_DO)
        first, *stages, last = (tensors[name].shape for name in needed)
        encoder = tensors.get("encoder.0.weight")
        return cls(
            decoder_widths=(first[0], stages[0][0], stages[1][0], stages[2][0]),
            encoder_width=None if encoder is None else encoder.shape[0],
            latent_channels=first[1],
            image_channels=last[0],
        )


@dataclass(frozen=True)
class TAEHVDecoderState:
    """What a decoder must remember between two calls.

    Args:
        memories: per MemBlock the last frame of its input, [B, C, H, W].
        latents_seen: latent frames decoded so far.
    """

    memories: tuple[Tensor, ...]
    latents_seen: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All there is to remember."""
        return self.memories


@dataclass(frozen=True)
class TAEHVEncoderState:
    """What an encoder must remember between two calls.

    Args:
        memories: per MemBlock the last frame of its input, [B, C, H, W].
        latents_seen: latent frames produced so far.
    """

    memories: tuple[Tensor, ...]
    latents_seen: int


def _conv3x3(
    in_channels: int, out_channels: int, *, stride: int = 1, bias: bool = True
) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=bias)


class LatentClamp(nn.Module):
    """Soft limit of latents to (-3, 3): `3 tanh(x / 3)`."""

    def forward(self, latents: Tensor) -> Tensor:
        return torch.tanh(latents / _LATENT_LIMIT) * _LATENT_LIMIT


class MemBlock(nn.Module):
    """Residual block over a frame and the frame before it.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; a 1x1 `skip` exists where the two differ.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv3x3(2 * in_channels, out_channels),
            nn.ReLU(inplace=True),
            _conv3x3(out_channels, out_channels),
            nn.ReLU(inplace=True),
            _conv3x3(out_channels, out_channels),
        )
        self.skip = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1, bias=False)
        )

    def forward(self, frames: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """Process consecutive frames in one call.

        Args:
            frames: [B, T, C, H, W].
            memory: the frame before `frames`, [B, C, H, W]; None at the start of a stream, which
                means a frame of zeros.

        Returns:
            The result [B, T, C', H, W] and the memory for the next call.
        """
        first = torch.zeros_like(frames[:, :1]) if memory is None else memory.unsqueeze(1)
        previous = torch.cat([first, frames[:, :-1]], dim=1)
        pairs = torch.cat([frames, previous], dim=2).flatten(0, 1)  # [B*T, 2C, H, W]
        result = F.relu(self.conv(pairs) + self.skip(frames.flatten(0, 1)), inplace=True)
        # A copy, because a view would keep the whole chunk's features alive between calls.
        return result.unflatten(0, frames.shape[:2]), frames[:, -1].clone()


class TPool(nn.Module):
    """Join `stride` consecutive frames into one by a 1x1 convolution over all their channels."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels * stride, channels, 1, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        """[B, T, C, H, W], T a multiple of the stride -> [B, T / stride, C, H, W]."""
        batch, time, channels, height, width = frames.shape
        joined = frames.reshape(-1, self.stride * channels, height, width)
        return self.conv(joined).unflatten(0, (batch, time // self.stride))


class TGrow(nn.Module):
    """Split one frame into `stride` consecutive frames by a 1x1 convolution."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels, channels * stride, 1, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        """[B, T, C, H, W] -> [B, stride T, C, H, W]."""
        batch, time, channels, height, width = frames.shape
        grown = self.conv(frames.flatten(0, 1))
        return grown.reshape(batch, time * self.stride, channels, height, width)


def _build_encoder(config: TAEHVConfig, width: int) -> nn.Sequential:
    layers: list[nn.Module] = [_conv3x3(config.image_channels, width), nn.ReLU(inplace=True)]
    for stride in _ENCODER_TIME_STRIDES:
        layers += [TPool(width, stride), _conv3x3(width, width, stride=2, bias=False)]
        layers += [MemBlock(width, width) for _ in range(_BLOCKS_PER_STAGE)]
    layers.append(_conv3x3(width, config.latent_channels))
    return nn.Sequential(*layers)


def _build_decoder(config: TAEHVConfig) -> nn.Sequential:
    widths = config.decoder_widths
    layers: list[nn.Module] = [
        LatentClamp(),
        _conv3x3(config.latent_channels, widths[0]),
        nn.ReLU(inplace=True),
    ]
    stages = zip(widths[:-1], widths[1:], _DECODER_TIME_STRIDES, strict=True)
    for width, next_width, stride in stages:
        layers += [MemBlock(width, width) for _ in range(_BLOCKS_PER_STAGE)]
        layers += [nn.Upsample(scale_factor=2), TGrow(width, stride)]
        layers.append(_conv3x3(width, next_width, bias=False))
    layers += [nn.ReLU(inplace=True), _conv3x3(widths[-1], config.image_channels)]
    return nn.Sequential(*layers)


def _per_frame(layer: nn.Module, frames: Tensor) -> Tensor:
    """Apply a 2-D layer to every frame of [B, T, C, H, W]."""
    return layer(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])


class TAEHV(nn.Module):
    """Tiny autoencoder between Wan 2.1 latents and RGB frames.

    A latent frame stands for four pixel frames at an eighth of the size. Latents are passed as the
    file wants them; pixel frames are nominally in [0, 1], and decoded ones are neither clamped nor
    trimmed. The first `FRAMES_TO_TRIM` decoded frames of a stream have no counterpart in the video
    and are dropped by the caller.

    Args:
        config: the sizes; the default is taew2_1's.
    """

    def __init__(self, config: TAEHVConfig | None = None) -> None:
        super().__init__()
        self.config = config or TAEHVConfig()
        width = self.config.encoder_width
        self.encoder = None if width is None else _build_encoder(self.config, width)
        self.decoder = _build_decoder(self.config)

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor]) -> TAEHV:
        """Build the network that fits a state dict and load it, in the tensors' own dtype.

        Args:
            tensors: a TAEHV state dict; the encoder may be absent.

        Raises:
            UserError: it is not a TAEHV state dict, or tensors are missing, unexpected or misfit.
        """
        config = TAEHVConfig.from_state_dict(tensors)
        # Meta first: initial values would be thrown away, and drawing them would shift the
        # caller's random numbers.
        with torch.device("meta"):
            model = cls(config).to(dtype=tensors["decoder.1.weight"].dtype)
        model.load_tensors(tensors)
        return model

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load weights strictly, cutting time-growing layers that are larger than this network's.

        Files made for more temporal upsampling hold `TGrow` weights for more frames than needed;
        their last rows are the ones that make the last frame, and only those are kept.

        Args:
            tensors: a state dict of the published names.

        Raises:
            UserError: tensors are missing, unexpected, of another shape or not finite.
        """
        own = self.state_dict()
        fitted = dict(tensors)
        for first_block in _DECODER_STAGES:
            name = f"decoder.{first_block + _BLOCKS_PER_STAGE + 1}.conv.weight"
            if name in fitted and fitted[name].shape[:1] > own[name].shape[:1]:
                fitted[name] = fitted[name][-own[name].shape[0] :]
        load_exactly(
            self,
            fitted,
            what="TAEHV",
            do=_DO,
        )

    def decode(
        self, latents: Tensor, state: TAEHVDecoderState | None = None
    ) -> tuple[Tensor, TAEHVDecoderState]:
        """Decode consecutive latent frames; all of them in parallel.

        Args:
            latents: [B, T, latent channels, h, w], T >= 1, in the network's dtype.
            state: what the call for the frames before returned; None at the start of a stream.

        Returns:
            Frames [B, 4 T, 3, 8 h, 8 w], neither clamped nor trimmed, and the new state. Any split
            of a stream into calls gives the same frames.

        Raises:
            ValueError: the shape is not as above.
        """
        if latents.ndim != 5 or latents.shape[2] != self.config.latent_channels:
            raise ValueError(
                f"latents must be [B, T, {self.config.latent_channels}, h, w], "
                f"got {list(latents.shape)}"
            )
        old: Sequence[Tensor | None] = state.memories if state else [None] * _MEM_BLOCKS
        memories: list[Tensor] = []
        layers = self.decoder
        frames = _per_frame(layers[:3], latents)
        for first_block in _DECODER_STAGES:
            after = first_block + _BLOCKS_PER_STAGE
            for index in range(first_block, after):
                frames, memory = layers[index](frames, old[len(memories)])
                memories.append(memory)
            # Published order is upsample, then grow. A 1x1 convolution commutes with nearest
            # upsampling, and on the small frames it costs a quarter.
            frames = layers[after + 1](frames)
            frames = _per_frame(layers[after], frames)
            frames = _per_frame(layers[after + 2], frames)
        frames = _per_frame(layers[21:], frames)
        seen = latents.shape[1] + (state.latents_seen if state else 0)
        return frames, TAEHVDecoderState(tuple(memories), seen)

    def encode(
        self, frames: Tensor, state: TAEHVEncoderState | None = None
    ) -> tuple[Tensor, TAEHVEncoderState]:
        """Encode consecutive groups of four pixel frames; all of them in parallel.

        Args:
            frames: [B, 4 T, 3, H, W] in [0, 1], T >= 1, H and W multiples of 8, in the network's
                dtype. How a video of 1 + 4 k frames becomes groups of four is the caller's part.
            state: what the call for the frames before returned; None at the start of a stream.

        Returns:
            Latents [B, T, latent channels, H / 8, W / 8] and the new state. Any split of a stream
            into groups of four gives the same latents.

        Raises:
            ValueError: the shape is not as above, or this network has no encoder.
        """
        if self.encoder is None:
            raise ValueError("this TAEHV file has no encoder; it can only decode")
        shape = frames.shape
        if (
            frames.ndim != 5
            or shape[1] % FRAMES_PER_LATENT
            or shape[2] != self.config.image_channels
            or shape[3] % SPATIAL_SCALE
            or shape[4] % SPATIAL_SCALE
        ):
            raise ValueError(
                f"frames must be [B, 4 T, {self.config.image_channels}, H, W] with H and W "
                f"multiples of {SPATIAL_SCALE}, got {list(shape)}"
            )
        old: Sequence[Tensor | None] = state.memories if state else [None] * _MEM_BLOCKS
        memories: list[Tensor] = []
        layers = self.encoder
        features = _per_frame(layers[:2], frames)
        for first_block in _ENCODER_STAGES:
            features = _per_frame(layers[first_block - 1], layers[first_block - 2](features))
            for index in range(first_block, first_block + _BLOCKS_PER_STAGE):
                features, memory = layers[index](features, old[len(memories)])
                memories.append(memory)
        latents = _per_frame(layers[17], features)
        seen = latents.shape[1] + (state.latents_seen if state else 0)
        return latents, TAEHVEncoderState(tuple(memories), seen)
