"""`lightforcing bench vae`: streaming decoders at the real shapes, random weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..layout import FrameSize
from ..vae.channel_operations import fast_obstacle
from ..vae.streaming import VideoVAE
from ..vae.taehv import TAEHV, TAEHVConfig
from ..vae.wan_vae import WanVAE, WanVAEConfig
from .common import device_name, machine_facts

_LATENT_CHANNELS = 16
_RECORDED, _PLAIN = "recorded", "plain torch"
_WAYS = ("", _RECORDED, _PLAIN)
"""A decoder's first video with the kernels, later ones, without them."""


@dataclass(frozen=True)
class VAECase:
    """What to measure: pixels, latent frames of a chunk, how many chunks in a row."""

    size: FrameSize
    chunk_frames: int = 3
    chunks: int = 4
    dtype: torch.dtype = torch.bfloat16


SMALL = VAECase(FrameSize(64, 48), chunks=2, dtype=torch.float32)


def decoder_network(name: str) -> WanVAE | TAEHV:
    """A network with random weights: 'wan', 'lightvae' or 'taehv' at their published widths, or
    'wan small' or 'taehv small'."""
    if name.startswith("taehv"):
        widths = {"decoder_widths": (8, 8, 8, 8)} if name.endswith("small") else {}
        return TAEHV(TAEHVConfig(encoder_width=None, **widths)).requires_grad_(False)
    dim = {"wan": 96, "lightvae": 24, "wan small": 8}[name]
    return WanVAE(WanVAEConfig.from_dim(dim)).requires_grad_(False)


@torch.no_grad()
def bench_vae(
    cases: Sequence[VAECase], device: torch.device, *, small: bool = False, repeats: int = 5
) -> dict[str, Any]:
    """Time of decoding one chunk in the middle of a stream (the first one is shorter).

    Where the kernels can run, every network is measured as a decoder's first video finds it, as
    later ones do ('recorded': passes are CUDA graphs by then), and without the kernels ('plain
    torch'); rows of the kernels come after frames that agree with plain torch's.

    Returns:
        `rows` (median, fastest and slowest milliseconds a chunk, frames per second),
        `device`, `versions`.

    Raises:
        RuntimeError: the kernels' frames are further from float32 than rounding explains.
    """
    rows = []
    for case in cases:
        for name in ("wan small", "taehv small") if small else ("wan", "lightvae", "taehv"):
            vae = VideoVAE(decoder_network(name).to(device, case.dtype).eval())
            shape = (
                1,
                _LATENT_CHANNELS,
                case.chunk_frames,
                case.size.latent_height,
                case.size.latent_width,
            )
            latents = torch.randn(shape, device=device).to(case.dtype)
            has_kernels = not fast_obstacle(device, case.dtype)
            if has_kernels:
                _require_same_frames(name, device, case.dtype)
            for way in _WAYS if has_kernels else _WAYS[:1]:
                method = f"{name}, {way}" if way else name
                samples, frames = _decode_times(vae, latents, case.chunks, repeats, way=way)
                median = statistics.median(samples)
                rows.append(
                    {
                        "method": method,
                        "width": case.size.width,
                        "height": case.size.height,
                        "frames": frames,
                        "ms": round(median, 3),
                        "ms_min": round(min(samples), 3),
                        "ms_max": round(max(samples), 3),
                        "frames_per_second": round(frames / median * 1e3, 1),
                    }
                )
            del vae
    return {"device": device_name(device), "versions": machine_facts(device), "rows": rows}


def _decode_times(
    vae: VideoVAE, latents: torch.Tensor, chunks: int, repeats: int, *, way: str
) -> tuple[list[float], int]:
    """Milliseconds of every chunk but the first of each stream, and frames of the last chunk."""
    samples: list[float] = []
    decoder, device = vae.new_decoder(use_kernels=way != _PLAIN), latents.device

    def decode() -> torch.Tensor:
        if device.type != "cuda":
            return decoder.decode(latents)
        with torch.cuda.device(device), torch.cuda.stream(decoder.side_stream(device)):
            return decoder.decode(latents)

    # On the decoder's own thread, as beside a rollout: cuDNN plans anew for each thread.
    beside = decoder.side_thread()
    for _ in range(repeats + 1):
        decoder.reset()
        if way == _RECORDED:
            decoder.record()
        for chunk in range(chunks):
            started = _wait(device)
            frames = beside.submit(decode).result()
            spent = _wait(device) - started
            if chunk:
                samples.append(spent * 1e3)
    return samples[chunks - 1 :], frames.shape[1]  # the first stream warms up


def _require_same_frames(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Both ways to decode against float32, on small frames: the kernels may round like torch."""
    network = decoder_network(name).to(device).eval()
    latents = torch.randn(1, _LATENT_CHANNELS, 4, 12, 20, device=device)
    exact = VideoVAE(network).new_decoder(use_kernels=False).decode(latents)
    vae = VideoVAE(network.to(dtype))
    errors = []
    for use_kernels in (False, True):
        decoder = vae.new_decoder(use_kernels=use_kernels)
        frames = torch.cat([decoder.decode(part) for part in latents.split(2, dim=2)], dim=1)
        errors.append((frames - exact).square().mean().sqrt().item())
    plain, fast = errors
    if not fast <= 2 * plain + 1e-4:
        raise RuntimeError(
            f"{name}: frames of the kernels are {fast:.2e} from float32, plain torch's {plain:.2e};"
            " nothing was measured"
        )


def _wait(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
