"""What `bench rollout` measures, and what a measured video is."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..layout import FrameSize, latent_frames
from ..noise import SeededNoise
from ..rollout_settings import RolloutSettings
from ..sparse_settings import SparseSettings
from ..vae.streaming import VideoVAE
from ..wan.config import WanConfig
from ..wan.forward import TextContext, prepare_text
from ..wan.modules import WanModel
from .vae import decoder_network

NO_DECODER = "none"
_PROMPT_TOKENS = 64
_GIB = 2**30


@dataclass(frozen=True)
class RolloutCase:
    """What to measure.

    Attributes:
        size: pixels.
        frames: pixel frames.
        config: the denoiser's sizes.
        decoder: a name of `bench.vae.decoder_network`, or NO_DECODER.
        window_frames, sink_frames: latent frames attention sees; -1: the whole history.
    """

    size: FrameSize
    frames: int = 81
    config: WanConfig = field(default_factory=WanConfig)
    dtype: torch.dtype = torch.bfloat16
    frames_per_chunk: int = 3
    decoder: str = "taehv"
    window_frames: int = -1
    sink_frames: int = 0

    def settings(self, sparse: SparseSettings | None) -> RolloutSettings:
        """Of its video; None: dense."""
        return RolloutSettings(
            latent_frames(self.frames),
            frames_per_chunk=self.frames_per_chunk,
            window_frames=self.window_frames,
            sink_frames=self.sink_frames,
            sparse=sparse,
        )

    def noise(self, device: torch.device) -> SeededNoise:
        """Where its video begins."""
        shape = (1, self.config.in_dim, self.size.latent_height, self.size.latent_width)
        return SeededNoise(0, shape, device)


SMALL = RolloutCase(
    FrameSize(64, 48),
    frames=33,
    config=WanConfig(dim=128, ffn_dim=256, num_heads=1, num_layers=2, text_dim=32),
    dtype=torch.float32,
    decoder="taehv small",
)


@dataclass(frozen=True)
class ChunkTimes:
    """Of one chunk: seconds of its denoising, of the clean pass before it, of its decoding (None:
    not decoded), and the shares of attention that were to be skipped and that were computed."""

    denoise: float
    clean: float
    decode: float | None
    sparsity: float = 0.0
    density: float = 1.0

    @property
    def made(self) -> float:
        """Seconds without decoding."""
        return self.denoise + self.clean


@dataclass(frozen=True)
class Run:
    """One video, seconds from its start on.

    Attributes:
        seconds: until the last frame lies on the host; without a decoder until the last latents.
        first_frames: until the first chunk's frames lie on the host; None without a decoder.
    """

    chunks: list[ChunkTimes]
    seconds: float
    first_frames: float | None

    @property
    def made(self) -> float:
        """Seconds in denoising and clean passes."""
        return sum(chunk.made for chunk in self.chunks)

    @property
    def growth(self) -> float | None:
        """Time of the last chunk over that of the second, each with the clean pass before it; the
        first one, which has none, is left out. None: fewer than three chunks."""
        return self.chunks[-1].made / self.chunks[1].made if len(self.chunks) > 2 else None


def random_denoiser(case: RolloutCase, device: torch.device) -> WanModel:
    """A denoiser with random weights that keeps numbers in range."""
    torch.manual_seed(0)
    with torch.device(device):
        tree = WanModel(case.config).to(case.dtype)
    return tree.requires_grad_(False).eval()


@torch.no_grad()
def random_prompt(case: RolloutCase, tree: torch.nn.Module, device: torch.device) -> TextContext:
    """A prompt as the denoiser's layers see it."""
    embeds = torch.randn(1, _PROMPT_TOKENS, case.config.text_dim, device=device)
    return prepare_text(tree, embeds.to(case.dtype))


def random_vae(case: RolloutCase, device: torch.device) -> VideoVAE | None:
    """The case's decoder with random weights; None without one."""
    if case.decoder == NO_DECODER:
        return None
    return VideoVAE(decoder_network(case.decoder).to(device, case.dtype).eval())


def wait(device: torch.device) -> float:
    """Seconds on the host's clock when the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def free_memory(device: torch.device) -> None:
    """Give back what nothing holds, so that the next method's memory is its own."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def peak_memory(make: Callable[[], Run], device: torch.device) -> dict[str, float | None]:
    """GiB allocated and reserved at the highest point of one more video; None on the CPU.

    Counted is all that torch holds on the device: weights, key/value cache, recorded graphs, the
    decoder with what it keeps between chunks, frames on their way to the host. The CUDA context
    and libraries' own memory (some hundred MiB) are not.
    """
    names = ("peak_allocated_gib", "peak_reserved_gib")
    if device.type != "cuda":
        return dict.fromkeys(names)
    free_memory(device)
    torch.cuda.reset_peak_memory_stats(device)
    make()
    torch.cuda.synchronize(device)
    peaks = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return {name: round(peak / _GIB, 3) for name, peak in zip(names, peaks, strict=True)}
