"""One interface to every autoencoder: latents in, frames out, chunk by chunk, and back.

A `VideoVAE` holds weights and conventions and may be shared. What a run must remember between
chunks lives in the `StreamingDecoder` or `StreamingEncoder` of that run and dies with it.

Common layout at this edge: latents [B, 16, T, h, w], normalised as diffusion models use them;
frames [B, t, 3, 8 h, 8 w], RGB in [0, 1]. A stream of T latent frames is 1 + 4 (T - 1) frames.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import UserError
from .channel_operations import fast_obstacle, triton_operations
from .fast_taehv import FastTAEHVDecoder
from .fast_wan import FastWanDecoder
from .latent_stats import LATENT_CHANNELS, denormalise_latents, normalise_latents
from .recording import RecordedPasses
from .taehv import FRAMES_TO_TRIM, TAEHV, TAEHVDecoderState, TAEHVEncoderState
from .wan_vae import WanVAE, WanVAEState

log = logging.getLogger("lightforcing")

FRAMES_PER_LATENT = 4
SPATIAL_SCALE = 8
# Three is the usual chunk; more at once costs memory and gains no speed.
DEFAULT_LATENTS_PER_PASS = 3

LatentConvention = Literal["normalised", "denormalised"]
EncodePadding = Literal["front", "end"]


@dataclass(frozen=True)
class VideoVAE:
    """Weights of an autoencoder and the conventions of its file.

    Args:
        network: the weights.
        latents: TAEHV only: which latents the file was trained on. taew2_1 takes normalised ones,
            lighttaew2_1 denormalised ones, and the two cannot be told apart by their tensors.
        encode_padding: TAEHV only: how 1 + 4 k frames become groups of four. 'end' repeats the
            last frame (published files); 'front' repeats the first, so that latent frame t is
            pixel frames 4 t - 3 .. 4 t as in the Wan VAE (the embedded autoencoder).

    Raises:
        ValueError: an unknown convention.
    """

    network: WanVAE | TAEHV
    latents: LatentConvention = "normalised"
    encode_padding: EncodePadding = "end"

    def __post_init__(self) -> None:
        if self.latents not in get_args(LatentConvention):
            raise ValueError(f"latents must be normalised or denormalised, got {self.latents!r}")
        if self.encode_padding not in get_args(EncodePadding):
            raise ValueError(f"encode_padding must be front or end, got {self.encode_padding!r}")

    @property
    def kind(self) -> Literal["wan", "taehv"]:
        """Which family the network is of."""
        return "wan" if isinstance(self.network, WanVAE) else "taehv"

    @property
    def can_encode(self) -> bool:
        """Whether the file has an encoder."""
        return self.network.encoder is not None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are, and what the network computes in."""
        return next(self.network.parameters()).dtype

    def new_decoder(
        self, *, latents_per_pass: int = DEFAULT_LATENTS_PER_PASS, use_kernels: bool = True
    ) -> StreamingDecoder:
        """A decoder at the start of a stream. See `StreamingDecoder`."""
        return StreamingDecoder(self, latents_per_pass=latents_per_pass, use_kernels=use_kernels)

    def new_encoder(self, *, latents_per_pass: int = DEFAULT_LATENTS_PER_PASS) -> StreamingEncoder:
        """An encoder at the start of a stream. See `StreamingEncoder`.

        Raises:
            UserError: the file has no encoder.
        """
        if not self.can_encode:
            raise UserError(
                "this VAE file has no encoder, so it cannot turn images or video into latents; "
                "give a complete VAE file"
            )
        return StreamingEncoder(self, latents_per_pass=latents_per_pass)


def _unit_range(frames: Tensor) -> Tensor:
    """Clamp to [0, 1]; infinity becomes NaN, or an overflow would pass for plain black or white."""
    return torch.where(frames.isinf(), torch.nan, frames.clamp(0, 1))


def _out_of_memory(what: str, latents: int) -> UserError:
    at_once = "one latent frame" if latents == 1 else f"{latents} latent frames at once"
    return UserError(
        f"the GPU ran out of memory {what} {at_once}; take a smaller size, a shorter window, "
        "LightVAE or a TAEHV file"
    )


class StreamingDecoder:
    """Decodes the latent frames of one video as they come. Memory does not grow with its length.

    Args:
        vae: the weights and conventions.
        latents_per_pass: most latent frames in one pass of the network; bounds the memory of a
            call, and does not change the frames.
        use_kernels: decode channels-last with Triton kernels where the weights are float16 or
            bfloat16 on a GPU that can; frames differ by rounding. False: plain torch everywhere.

    Raises:
        ValueError: `latents_per_pass` is below 1.
    """

    def __init__(
        self,
        vae: VideoVAE,
        *,
        latents_per_pass: int = DEFAULT_LATENTS_PER_PASS,
        use_kernels: bool = True,
    ) -> None:
        if latents_per_pass < 1:
            raise ValueError(f"latents_per_pass must be at least 1, got {latents_per_pass}")
        self._vae = vae
        self._latents_per_pass = latents_per_pass
        self._use_kernels = use_kernels
        self._fast: FastWanDecoder | FastTAEHVDecoder | None = None
        self._fast_device: torch.device | None = None
        self._passes: RecordedPasses | None = None
        self._side_stream: torch.cuda.Stream | None = None
        self._side_device: torch.device | None = None
        self._side_thread: ThreadPoolExecutor | None = None
        self._state: WanVAEState | TAEHVDecoderState | None = None

    @property
    def latents_seen(self) -> int:
        """Latent frames decoded since the start of the stream."""
        return self._state.latents_seen if self._state else 0

    @property
    def state_bytes(self) -> int:
        """Bytes held between two calls."""
        held = () if self._state is None else self._state.tensors
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def reset(self) -> None:
        """Forget the stream; the next call starts another. What was made ready stays."""
        self._state = None

    def side_stream(self, device: torch.device) -> torch.cuda.Stream:
        """A CUDA stream to decode on beside other work; the same one for every video, since
        memory that was freed on one stream serves no other."""
        # Not the stream's own device, which has a number where this one may have none.
        if self._side_stream is None or self._side_device != device:
            self._side_stream, self._side_device = torch.cuda.Stream(device), device
        return self._side_stream

    def side_thread(self) -> ThreadPoolExecutor:
        """A thread to decode on beside other work; the same one for every video, since cuDNN plans
        its convolutions and attention anew for each thread, which takes longer than a chunk does.
        It ends with the decoder."""
        if self._side_thread is None:
            self._side_thread = ThreadPoolExecutor(1, thread_name_prefix="lightforcing-decode")
        return self._side_thread

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next latent frames of the stream.

        Args:
            latents: normalised, [B, 16, T, h, w], T >= 1, any float dtype, any device.

        Returns:
            Frames [B, t, 3, 8 h, 8 w], float32, clamped to [0, 1], on the network's device, with
            t = 1 + 4 (T - 1) at the start of the stream and 4 T later. NaN and infinity
            in the network's output are NaN here.

        Raises:
            ValueError: the shape is not as above, or differs from the calls before.
            UserError: the GPU ran out of memory, with a single latent frame too. The stream is then
                where it was before the pass that failed.
        """
        shape = latents.shape
        if latents.ndim != 5 or shape[1] != LATENT_CHANNELS or shape[2] < 1:
            raise ValueError(f"latents must be [B, {LATENT_CHANNELS}, T, h, w], got {list(shape)}")
        self._check_same_stream(latents)
        parts = []
        done = 0
        while done < latents.shape[2]:
            part = latents[:, :, done : done + self._latents_per_pass]
            try:
                parts.append(self._decode_pass(part.to(self._vae.device, self._vae.dtype)))
            except torch.cuda.OutOfMemoryError as error:
                if part.shape[2] == 1:
                    raise _out_of_memory("decoding", 1) from error
                log.warning(
                    "decoding %d latent frames at once does not fit the GPU's memory; going on "
                    "one by one, with the same result",
                    part.shape[2],
                )
                self._latents_per_pass = 1
                continue
            done += part.shape[2]
        return torch.cat(parts, dim=1)

    def _check_same_stream(self, latents: Tensor) -> None:
        if self._state is None:
            return
        kept = self._state.tensors[0]  # at latent resolution in both families
        expected = (kept.shape[0], *kept.shape[-2:])
        got = (latents.shape[0], *latents.shape[-2:])
        if expected != got:
            raise ValueError(
                f"this stream has batch, height, width {expected} (latent), got {got}; "
                "call reset() to start another"
            )

    def _prepare(self, device: torch.device) -> None:
        """Choose how to decode; not before the first pass, because a host may move the weights."""
        if self._fast_device == device:
            return
        self._fast = self._passes = None
        vae = self._vae
        why = fast_obstacle(device, vae.dtype) if self._use_kernels else "asked for"
        if not why:
            is_wan = isinstance(vae.network, WanVAE)
            make = FastWanDecoder if is_wan else FastTAEHVDecoder
            self._fast = fast = make(vae.network, triton_operations(device))

            # Not a method: what recordings name would stay until Python looks for cycles.
            def run(latents: Tensor, state: Any) -> tuple[Tensor, Any]:
                return fast.decode(latents if is_wan else latents.transpose(1, 2), state)

            make_state = WanVAEState if is_wan else TAEHVDecoderState
            self._passes = RecordedPasses(run, make_state, vae.network.parameters)
        # Last: had memory run out above, the next pass must choose again.
        self._fast_device = device
        taken = f"plain torch: {why}" if why else "Triton kernels, channels-last"
        log.info("decoding with %s", taken)

    def record(self) -> None:
        """Before the first chunk of another video: record what the last one ran as CUDA graphs,
        where it ran beside other work. Nobody may wait for the whole device meanwhile, which would
        end a recording; hence not while a video is made."""
        if self._passes is None or self._state is not None or self._side_stream is None:
            return
        # On its thread: cuDNN's plans are there.
        self.side_thread().submit(self._passes.record, self._side_stream).result()

    def _decode_pass(self, latents: Tensor) -> Tensor:
        self._prepare(latents.device)
        at_start = self._state is None
        network = self._vae.network
        is_wan = isinstance(network, WanVAE)
        if self._vae.latents == "denormalised" and not is_wan:
            latents = denormalise_latents(latents)
        if self._passes is not None:
            frames, self._state = self._passes(latents, self._state)
        elif is_wan:
            pixels, self._state = network.decode(latents, self._state)
            return _unit_range(pixels.transpose(1, 2).float() * 0.5 + 0.5)
        else:
            frames, self._state = network.decode(latents.transpose(1, 2), self._state)
        if not is_wan:
            frames = frames[:, FRAMES_TO_TRIM if at_start else 0 :]
        return frames if self._passes is not None else _unit_range(frames.float())


class StreamingEncoder:
    """Encodes the frames of one video as they come. Memory does not grow with its length.

    Args:
        vae: the weights and conventions; must have an encoder.
        latents_per_pass: most latent frames in one pass of the network; bounds the memory of a
            call, and does not change the latents.

    Raises:
        ValueError: `latents_per_pass` is below 1.
    """

    def __init__(self, vae: VideoVAE, *, latents_per_pass: int = DEFAULT_LATENTS_PER_PASS) -> None:
        if latents_per_pass < 1:
            raise ValueError(f"latents_per_pass must be at least 1, got {latents_per_pass}")
        self._vae = vae
        self._latents_per_pass = latents_per_pass
        self._state: WanVAEState | TAEHVEncoderState | None = None

    @property
    def latents_seen(self) -> int:
        """Latent frames produced since the start of the stream."""
        return self._state.latents_seen if self._state else 0

    def reset(self) -> None:
        """Forget the stream; the next call starts another."""
        self._state = None

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Encode the next frames of the stream.

        Args:
            frames: [B, t, 3, H, W] in [0, 1], any float dtype, any device; H and W multiples of 8;
                t = 1 + 4 k at the start of the stream and 4 k later.

        Returns:
            Normalised latents [B, 16, T, H / 8, W / 8], float32, on the network's device, with
            T = 1 + k at the start of the stream and k later.

        Raises:
            ValueError: the shape is not as above; or the stream goes on after a call of a file
                that pads the end, whose last latent frame already holds the padding.
            UserError: the GPU ran out of memory. The stream is then where it was before the pass
                that failed.
        """
        at_start = self._state is None
        shape = frames.shape
        if (
            frames.ndim != 5
            or shape[2] != 3
            or shape[3] % SPATIAL_SCALE
            or shape[4] % SPATIAL_SCALE
        ):
            raise ValueError(
                f"frames must be [B, t, 3, H, W] with H and W multiples of {SPATIAL_SCALE}, "
                f"got {list(shape)}"
            )
        if shape[1] < 1 or shape[1] % FRAMES_PER_LATENT != (1 if at_start else 0):
            count = "1 + 4 k frames at the start of a stream" if at_start else "4 k frames later on"
            raise ValueError(f"the encoder takes {count}, got {shape[1]}")
        wan = isinstance(self._vae.network, WanVAE)
        if at_start and not wan:
            frames = self._pad(frames)
        elif not at_start and not wan and self._vae.encode_padding == "end":
            raise ValueError(
                "this TAEHV file pads the end of a video, so a stream is one call; call reset()"
            )
        first = 1 if at_start and wan else 0
        step = FRAMES_PER_LATENT * self._latents_per_pass
        count = frames.shape[1]
        # The first pass of a Wan stream takes three frames less: its first latent is one frame.
        head = min(step - (FRAMES_PER_LATENT - 1) * first, count)
        sizes = [head] + [min(step, count - start) for start in range(head, count, step)]
        parts = []
        for part in frames.split(sizes, dim=1):
            try:
                parts.append(self._encode_pass(part.to(self._vae.device, self._vae.dtype)))
            except torch.cuda.OutOfMemoryError as error:
                raise _out_of_memory("encoding", self._latents_per_pass) from error
        return torch.cat(parts, dim=2)

    def _pad(self, frames: Tensor) -> Tensor:
        missing = -frames.shape[1] % FRAMES_PER_LATENT
        if self._vae.encode_padding == "front":
            return torch.cat([frames[:, :1].expand(-1, missing, -1, -1, -1), frames], dim=1)
        return torch.cat([frames, frames[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)

    def _encode_pass(self, frames: Tensor) -> Tensor:
        if isinstance(self._vae.network, WanVAE):
            pixels = frames.transpose(1, 2) * 2 - 1
            latents, self._state = self._vae.network.encode(pixels, self._state)
            return latents.float()
        latents, self._state = self._vae.network.encode(frames, self._state)
        latents = latents.transpose(1, 2).float()
        return normalise_latents(latents) if self._vae.latents == "denormalised" else latents
