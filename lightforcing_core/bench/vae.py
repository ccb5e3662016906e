"""`lightforcing bench vae`: streaming decoders at the real shapes, random weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..layout import FrameSize
from ..vae.streaming import VideoVAE
from ..vae.taehv import TAEHV, TAEHVConfig
from ..vae.wan_vae import WanVAE, WanVAEConfig
from .common import device_name, machine_facts

_LATENT_CHANNELS = 16


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

    Returns:
        `rows` (median, fastest and slowest milliseconds a chunk, frames per second),
        `device`, `versions`.
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
            samples: list[float] = []
            for _ in range(repeats):
                decoder = vae.new_decoder()
                for chunk in range(case.chunks):
                    started = _wait(device)
                    frames = decoder.decode(latents)
                    spent = _wait(device) - started
                    if chunk:
                        samples.append(spent * 1e3)
            samples = samples[case.chunks - 1 :]  # the first stream warms up
            median = statistics.median(samples)
            rows.append(
                {
                    "method": name,
                    "width": case.size.width,
                    "height": case.size.height,
                    "frames": frames.shape[1],
                    "ms": round(median, 3),
                    "ms_min": round(min(samples), 3),
                    "ms_max": round(max(samples), 3),
                    "frames_per_second": round(frames.shape[1] / median * 1e3, 1),
                }
            )
            del vae, decoder
    return {"device": device_name(device), "versions": machine_facts(device), "rows": rows}


def _wait(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
