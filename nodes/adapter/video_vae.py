"""Any supported VAE as one that streams, and one of ours as a VAE that core nodes can call.

A LATENT of ComfyUI holds VAE latents, which are not normalised; `VideoVAE` takes and gives
normalised ones. They are converted here and nowhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import torch
from comfy.utils import ProgressBar
from torch import Tensor

from ...lightforcing_core.errors import UserError
from ...lightforcing_core.vae import TAEHV, StreamingDecoder, StreamingEncoder, VideoVAE, WanVAE
from ...lightforcing_core.vae.latent_stats import (
    LATENT_CHANNELS,
    denormalise_latents,
    normalise_latents,
)
from ...lightforcing_core.vae.streaming import (
    DEFAULT_LATENTS_PER_PASS,
    FRAMES_PER_LATENT,
    SPATIAL_SCALE,
)
from .memory import HeldPatcher

_DO = "load wan_2.1_vae, a LightVAE or a TAEHV file for Wan 2.1 with Load VAE"
# Bytes of tensors per latent pixel and byte of the number type, in a pass of
# DEFAULT_LATENTS_PER_PASS, what is kept between passes included: 7 and 1.3 GiB at 832x480 in
# bfloat16, LightVAE 1.7.
_WAN_BYTES, _LIGHT_BYTES, _TAEHV_BYTES = 600_000, 150_000, 110_000
_LIGHT_DIM = 32  # last width of a decoder; the full Wan VAE has 96, LightVAE 24


class StreamingVAE:
    """Weights of a VAE under ComfyUI's memory management, for decoding and encoding in parts."""

    def __init__(
        self,
        video_vae: VideoVAE,
        *,
        load_device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            video_vae: its network is moved and cast.
            load_device: where to run; None: where ComfyUI runs VAEs.
            dtype: to run in; None: what ComfyUI takes for VAEs.
        """
        management = comfy.model_management
        device = load_device or management.vae_device()
        dtype = dtype or management.vae_dtype(device, [torch.bfloat16, torch.float32])
        self.video_vae = video_vae
        self.dtype = dtype
        video_vae.network.to(management.vae_offload_device(), dtype)
        self.patcher = HeldPatcher(
            video_vae.network, load_device=device, offload_device=management.vae_offload_device()
        )

    def load(self, latent_height: int, latent_width: int) -> None:
        """Bring the weights to the device, with room for a pass over pictures of that size."""
        comfy.model_management.load_models_gpu(
            [self.patcher], memory_required=self.pass_bytes(latent_height, latent_width)
        )

    def pass_bytes(self, latent_height: int, latent_width: int) -> int:
        """Bytes that one pass takes beside the weights."""
        network = self.video_vae.network
        each = _TAEHV_BYTES
        if isinstance(network, WanVAE):
            each = _LIGHT_BYTES if network.config.decoder_widths[-1] <= _LIGHT_DIM else _WAN_BYTES
        size = torch.empty((), dtype=self.dtype).element_size()
        return each * latent_height * latent_width * size

    def new_decoder(self) -> StreamingDecoder:
        """For the chunks of one video; takes normalised latents."""
        return self.video_vae.new_decoder()

    def new_encoder(self) -> StreamingEncoder:
        """For the parts of one video; gives normalised latents."""
        return self.video_vae.new_encoder()

    def decode(self, samples: Tensor) -> Iterator[Tensor]:
        """Pictures of a LATENT, part by part.

        Args: samples of a LATENT, [B, 16, T, h, w].
        Yields: float32 [B, t, H, W, 3] on ComfyUI's intermediate device, 0..1.
        """
        if samples.ndim != 5 or samples.shape[1] != LATENT_CHANNELS:
            raise UserError(
                f"expected a Wan 2.1 video latent, [batch, {LATENT_CHANNELS}, frames, height, "
                f"width], got {list(samples.shape)}; connect the sampler's latent"
            )
        self.load(samples.shape[3], samples.shape[4])
        decoder = self.new_decoder()
        for part in samples.split(DEFAULT_LATENTS_PER_PASS, dim=2):
            frames = decoder.decode(normalise_latents(part.float()))
            yield as_image(frames)

    def encode(self, pixels: Tensor) -> Iterator[Tensor]:
        """A LATENT's samples of pictures, part by part.

        Args: pixels of an IMAGE, [t, H, W, 3] or [B, t, H, W, 3], 0..1. What exceeds 1 + 4 k
            pictures at the end, or multiples of 8 pixels at the borders, is cut off as core does.
        Yields: float32 [B, 16, T, h, w] on ComfyUI's intermediate device.
        """
        pixels = _whole(pixels)
        count, _, height, width = pixels.shape[1:]
        self.load(height // SPATIAL_SCALE, width // SPATIAL_SCALE)
        encoder = self.new_encoder()
        # One that pads the end of a video cannot go on after a call.
        whole = self.video_vae.kind == "taehv" and self.video_vae.encode_padding == "end"
        step = FRAMES_PER_LATENT * DEFAULT_LATENTS_PER_PASS
        first = count if whole else 1 + step
        edges = [0, *range(min(first, count), count, step), count]
        for start, end in itertools.pairwise(edges):
            latents = encoder.encode(pixels[:, start:end])
            yield denormalise_latents(latents).to(comfy.model_management.intermediate_device())


def as_image(frames: Tensor) -> Tensor:
    """Decoded frames [B, t, 3, H, W] as an IMAGE of videos, [B, t, H, W, 3], where it is kept."""
    pictures, place = frames.movedim(2, -1), comfy.model_management.intermediate_device()
    if pictures.device.type != "cuda" or place.type != "cpu":
        return pictures.to(place)
    staged = torch.empty_like(pictures, device=place, pin_memory=True)
    staged.copy_(pictures, non_blocking=True)
    torch.cuda.current_stream(pictures.device).synchronize()
    return staged.clone()  # an IMAGE may be kept for long, and pinned memory is scarce


def _whole(pixels: Tensor) -> Tensor:
    """An IMAGE as [B, t, 3, H, W] of sizes that encode, cut in the middle."""
    if pixels.ndim == 4:
        pixels = pixels[None]
    if pixels.ndim != 5 or pixels.shape[-1] < 3 or min(pixels.shape[2:4]) < SPATIAL_SCALE:
        raise UserError(
            f"expected pictures of at least {SPATIAL_SCALE}x{SPATIAL_SCALE} pixels, "
            f"[frames, height, width, 3], got {list(pixels.shape)}"
        )
    frames = 1 + (pixels.shape[1] - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT
    pixels = pixels[:, :frames, :, :, :3]
    for axis in (2, 3):
        size = pixels.shape[axis] // SPATIAL_SCALE * SPATIAL_SCALE
        pixels = pixels.narrow(axis, (pixels.shape[axis] - size) // 2, size)
    return pixels.movedim(-1, 2)


def streaming_vae(vae: Any) -> StreamingVAE:
    """A VAE of ours, or core's with weights for Wan 2.1 (Wan VAE, LightVAE, TAEHV), made to stream.

    For core's the network is built anew from its weights, which takes their size a second time.

    Raises:
        UserError: it is for other latents.
    """
    if isinstance(vae, PackVAE):
        return vae.streaming
    network = getattr(vae, "first_stage_model", None)
    if network is None:
        raise UserError(f"this VAE is empty; {_DO}")
    weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    try:
        if "decoder.middle.0.residual.0.gamma" in weights:
            video_vae = VideoVAE(WanVAE.from_state_dict(weights).eval().requires_grad_(False))
        elif "decoder.22.bias" in weights:
            # Core scales the latents of one file of the family only, taew2_1; the other takes VAE
            # latents as they are.
            scaled = getattr(network, "latent_format", None) is not None
            taehv = TAEHV.from_state_dict(weights).eval().requires_grad_(False)
            video_vae = VideoVAE(taehv, "normalised" if scaled else "denormalised")
        else:
            raise UserError(f"it is {type(network).__name__}")
    except UserError as error:
        raise UserError(f"this VAE is not for Wan 2.1 video ({error}); {_DO}") from error
    return StreamingVAE(video_vae, load_device=vae.device, dtype=vae.vae_dtype)


def decode_video(vae: Any, samples: Tensor) -> Tensor:
    """Pictures of a whole LATENT, with progress and heeding interrupts.

    Args: vae as for `streaming_vae`; samples [B, 16, T, h, w].
    Returns: float32 [B, t, H, W, 3], 0..1.
    """
    return torch.cat(list(_with_progress(streaming_vae(vae).decode(samples), samples.shape[2])), 1)


def encode_video(vae: Any, pixels: Tensor) -> Tensor:
    """A LATENT's samples [B, 16, T, h, w] of pictures, with progress and heeding interrupts."""
    latents = -(-pixels.shape[-4] // FRAMES_PER_LATENT)
    return torch.cat(list(_with_progress(streaming_vae(vae).encode(pixels), latents)), 2)


def _with_progress(parts: Iterator[Tensor], latents: int) -> Iterator[Tensor]:
    bar = ProgressBar(-(-latents // DEFAULT_LATENTS_PER_PASS))
    for part in parts:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(1)
        yield part


class PackVAE:
    """A `VideoVAE` with the interface of ComfyUI's VAE, as VAE Decode and VAE Encode call it."""

    def __init__(self, video_vae: VideoVAE) -> None:
        self.streaming = StreamingVAE(video_vae)
        self.patcher = self.streaming.patcher
        self.first_stage_model = video_vae.network
        self.device = self.patcher.load_device
        self.output_device = comfy.model_management.intermediate_device()
        self.vae_dtype = self.streaming.dtype
        self.latent_channels = LATENT_CHANNELS
        self.latent_dim = 3
        self.output_channels = 3
        self.crop_input = True
        self.upscale_ratio = (_pictures, SPATIAL_SCALE, SPATIAL_SCALE)
        self.downscale_ratio = (_latents, SPATIAL_SCALE, SPATIAL_SCALE)
        self.upscale_index_formula = (FRAMES_PER_LATENT, SPATIAL_SCALE, SPATIAL_SCALE)
        self.downscale_index_formula = self.upscale_index_formula

    def throw_exception_if_invalid(self) -> None:
        """Core asks before every use; one of ours is valid from the start."""

    def decode(self, samples_in: Tensor, vae_options: object = None) -> Tensor:
        """Pictures [B, t, H, W, 3] of a LATENT's samples."""
        return torch.cat(list(self.streaming.decode(samples_in)), dim=1)

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """Samples [B, 16, T, h, w] of an IMAGE."""
        return torch.cat(list(self.streaming.encode(pixel_samples)), dim=2)

    def decode_tiled(self, samples: Tensor, **tiles: object) -> Tensor:
        """As `decode`: it goes through a video in parts anyway, and its pictures are small."""
        return self.decode(samples)

    def encode_tiled(self, pixel_samples: Tensor, **tiles: object) -> Tensor:
        """As `encode`, see `decode_tiled`."""
        return self.encode(pixel_samples)

    def get_sd(self) -> dict[str, Tensor]:
        """The weights by name."""
        return self.first_stage_model.state_dict()

    def spacial_compression_decode(self) -> int:
        """Pixels per latent value; the name is core's."""
        return SPATIAL_SCALE

    def spacial_compression_encode(self) -> int:
        """See `spacial_compression_decode`."""
        return SPATIAL_SCALE

    def temporal_compression_decode(self) -> int:
        """Pictures per latent frame."""
        return FRAMES_PER_LATENT


def _pictures(latents: int) -> int:
    return max(0, FRAMES_PER_LATENT * latents - 3)


def _latents(pictures: int) -> int:
    return max(0, (pictures + 3) // FRAMES_PER_LATENT)
