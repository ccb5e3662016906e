"""`lightforcing bench rollout`: whole videos at the real shape, dense, sparse and a plain loop.

Weights are random, which changes nothing about speed. Every method makes a video once before the
runs that count, and decodes each chunk to frames on the host with the same streaming decoder: the
plain loop after each chunk, ours beside the next. The plain
loop is what a careful user would write in plain PyTorch: the same mathematics, torch.compile
around everything but attention, cuDNN attention over a cache that keys and values are copied
into, no frame slots, no statistics, no waiting.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..fast.decode import ChunkDecoder
from ..fast.engine import ForwardEngine, engine_for
from ..fast.linears import eight_bit_obstacle
from ..layout import FrameSize, latent_frames
from ..noise import SeededNoise
from ..rollout import rollout
from ..rollout_settings import RolloutSettings
from ..sparse_settings import SparseSettings
from ..timesteps import SELF_FORCING_STEPS, TRAIN_TIMESTEPS
from ..vae.streaming import StreamingDecoder, VideoVAE
from ..video_io import frames_to_uint8
from ..wan.compiled import compiled_block_runner
from ..wan.config import WanConfig
from ..wan.forward import TextContext, position_table, prepare_text, wan_forward
from ..wan.modules import WanModel
from .common import device_name, machine_facts
from .vae import decoder_network

log = logging.getLogger("lightforcing")


@dataclass(frozen=True)
class RolloutCase:
    """What to measure: pixels, pixel frames, the denoiser's sizes, a name of `bench.vae`."""

    size: FrameSize
    frames: int = 81
    config: WanConfig = field(default_factory=WanConfig)
    dtype: torch.dtype = torch.bfloat16
    frames_per_chunk: int = 3
    decoder: str = "taehv"


@dataclass(frozen=True)
class ChunkTimes:
    """Seconds of a chunk: its denoising, the clean pass before it, its decoding."""

    denoise: float
    clean: float
    decode: float


@dataclass(frozen=True)
class Run:
    """One video: its chunks, and seconds from the start to the last frame on the host."""

    chunks: list[ChunkTimes]
    seconds: float


SMALL = RolloutCase(
    FrameSize(64, 48),
    frames=33,
    config=WanConfig(dim=128, ffn_dim=256, num_heads=1, num_layers=2, text_dim=32),
    dtype=torch.float32,
    decoder="taehv small",
)


def bench_rollout(
    cases: Sequence[RolloutCase], device: torch.device, sparse: SparseSettings, repeats: int = 3
) -> dict[str, Any]:
    """Measure every method on every case.

    Returns:
        `rows` (one per case, method and chunk, and one with chunk 'all' that has the video's
        frames per second without and with decoding), `device`, `versions`.
    """
    rows: list[dict[str, Any]] = []
    for case in cases:
        tree = random_denoiser(case, device)
        text_dim = case.config.text_dim
        with torch.no_grad():
            embeds = torch.randn(1, 64, text_dim, device=device).to(case.dtype)
            text = prepare_text(tree, embeds)
        vae = VideoVAE(decoder_network(case.decoder).to(device, case.dtype).eval())
        methods = _methods(case, tree, text, device, sparse, vae)
        for name, run in methods.items():
            rows += _rows(case, name, run, repeats)
        del tree, text, methods, vae, run
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {"device": device_name(device), "versions": machine_facts(device), "rows": rows}


def _methods(
    case: RolloutCase,
    tree: WanModel,
    text: TextContext,
    device: torch.device,
    sparse: SparseSettings,
    vae: VideoVAE,
) -> dict[str, Callable[[], Run]]:
    """What is measured; on the CPU nothing is compiled."""

    def ours(settings: SparseSettings | None, speed: str | None) -> Callable[[], Run]:
        engine = None if speed is None else engine_for(tree, speed, keep=True)
        return lambda: _ours(case, tree, text, _settings(case, settings), device, engine, vae)

    methods: dict[str, Callable[[], Run]] = {
        "plain loop": PlainLoop(case, tree, text, device, vae),
        "dense": ours(None, None),
    }
    if device.type != "cuda":
        return methods | {"sparse": ours(sparse, None)}
    methods["dense, compiled"] = ours(None, "compiled")
    methods["sparse"] = ours(sparse, None)
    methods["sparse, graphs"] = ours(sparse, "graphs")
    methods["sparse, compiled, graphs"] = ours(sparse, "compiled")
    if eight_bit_obstacle(device, case.dtype) is None:
        methods["sparse, compiled, graphs, fp8"] = ours(sparse, "fp8")
    return methods


def random_denoiser(case: RolloutCase, device: torch.device) -> WanModel:
    """A denoiser with random weights that keeps numbers in range."""
    torch.manual_seed(0)
    with torch.device(device):
        tree = WanModel(case.config).to(case.dtype)
    return tree.requires_grad_(False).eval()


def _settings(case: RolloutCase, sparse: SparseSettings | None) -> RolloutSettings:
    return RolloutSettings(
        latent_frames(case.frames), frames_per_chunk=case.frames_per_chunk, sparse=sparse
    )


def _rows(
    case: RolloutCase, name: str, run: Callable[[], Run], repeats: int
) -> list[dict[str, Any]]:
    run()  # compiles, fills caches
    samples = [run() for _ in range(repeats)]
    made = [sum(chunk.denoise + chunk.clean for chunk in sample.chunks) for sample in samples]
    shown = [sample.seconds for sample in samples]
    typical = samples[made.index(sorted(made)[len(made) // 2])].chunks
    facts = {"method": name, "width": case.size.width, "height": case.size.height}
    rows = [
        {
            **facts,
            "chunk": i,
            **{f"{part}_ms": round(seconds * 1e3, 2) for part, seconds in asdict(times).items()},
        }
        for i, times in enumerate(typical)
    ]
    middle = statistics.median(made)
    rows.append(
        {
            **facts,
            "chunk": "all",
            "denoise_ms": round(sum(c.denoise for c in typical) * 1e3, 2),
            "clean_ms": round(sum(c.clean for c in typical) * 1e3, 2),
            "decode_ms": round(sum(c.decode for c in typical) * 1e3, 2),
            "decoder": case.decoder,
            "runs": repeats,
            "seconds": round(middle, 4),
            "seconds_min": round(min(made), 4),
            "seconds_max": round(max(made), 4),
            "frames_per_second": round(case.frames / middle, 2),
            "seconds_decoded": round(statistics.median(shown), 4),
            "frames_per_second_decoded": round(case.frames / statistics.median(shown), 2),
        }
    )
    log.info("%s", rows[-1])
    return rows


def _noise(case: RolloutCase, device: torch.device) -> SeededNoise:
    shape = (1, case.config.in_dim, case.size.latent_height, case.size.latent_width)
    return SeededNoise(0, shape, device)


def _ours(
    case: RolloutCase,
    tree: WanModel,
    text: TextContext,
    settings: RolloutSettings,
    device: torch.device,
    engine: ForwardEngine | None,
    vae: VideoVAE,
) -> Run:
    """Decoding goes on beside, so only its own time is known for a chunk, not what it adds."""
    started = _wait(device)
    noise = _noise(case, device)
    parts, decoded = [], []
    with ChunkDecoder(vae.new_decoder(), device) as decoding:
        for chunk in rollout(tree, settings, text, noise, dtype=case.dtype, engine=engine):
            parts.append(chunk.statistics)
            decoding.submit(chunk.latents)
        decoded += [chunk.seconds for chunk in decoding.take(wait=True)]
    seconds = _wait(device) - started
    chunks = [
        ChunkTimes(part.denoise_seconds, part.clean_seconds, decode)
        for part, decode in zip(parts, decoded, strict=True)
    ]
    return Run(chunks, seconds)


def _wait(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _decode_seconds(
    decoder: StreamingDecoder, latents: Tensor, dtype: torch.dtype, device: torch.device
) -> float:
    started = _wait(device)
    frames_to_uint8(decoder.decode(latents.to(dtype)))
    return _wait(device) - started


class PlainLoop:
    """The comparison: a compiled dense loop without this project's cache or attention."""

    def __init__(
        self,
        case: RolloutCase,
        tree: WanModel,
        text: TextContext,
        device: torch.device,
        vae: VideoVAE,
    ) -> None:
        self.case, self.tree, self.text, self.device = case, tree, text, device
        self.vae = vae
        self.runner = compiled_block_runner() if device.type == "cuda" else None
        self.frames = latent_frames(case.frames)
        config, tokens = case.config, case.size.frame_tokens
        shape = (1, self.frames * tokens, config.num_heads, config.head_dim)
        self.keys, self.values = (
            [torch.zeros(shape, device=device, dtype=case.dtype) for _ in range(config.num_layers)]
            for _ in range(2)
        )
        self.start = 0

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        end = self.start + k.shape[1]
        self.keys[layer][:, self.start : end] = k
        self.values[layer][:, self.start : end] = v
        past = (t[layer][:, :end].transpose(1, 2) for t in (self.keys, self.values))
        if self.device.type != "cuda":
            return F.scaled_dot_product_attention(q.transpose(1, 2), *past).transpose(1, 2)
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            return F.scaled_dot_product_attention(q.transpose(1, 2), *past).transpose(1, 2)

    def _forward(self, latents: Tensor, timestep: float, first: int) -> Tensor:
        frames = range(first, first + latents.shape[2])
        times = torch.full((1, latents.shape[2]), timestep, device=self.device)
        positions = position_table(
            self.tree, frames, latents.shape[3], latents.shape[4], self.device
        )
        return wan_forward(
            self.tree,
            latents.to(self.case.dtype),
            times,
            frames,
            self.text,
            self._attend,
            positions,
            self.runner,
        )

    @torch.no_grad()
    def __call__(self) -> Run:
        begun = _wait(self.device)
        noise, decoder = _noise(self.case, self.device), self.vae.new_decoder()
        result = []
        per_chunk, tokens = self.case.frames_per_chunk, self.case.size.frame_tokens
        clean = 0.0
        for first in range(0, self.frames, per_chunk):
            frames = range(first, min(first + per_chunk, self.frames))
            self.start = first * tokens
            started = _wait(self.device)
            latents = noise.initial(frames).float()
            for step, timestep in enumerate(SELF_FORCING_STEPS):
                sigma = timestep / TRAIN_TIMESTEPS
                if step:
                    fresh = noise.renoise(frames, step).float()
                    latents = (1 - sigma) * latents + sigma * fresh
                latents = latents - sigma * self._forward(latents, timestep, first).float()
            denoised = _wait(self.device)
            decode = _decode_seconds(decoder, latents, self.case.dtype, self.device)
            result.append(ChunkTimes(denoised - started, clean, decode))
            if first + per_chunk < self.frames:
                started = _wait(self.device)
                self._forward(latents, 0.0, first)
                clean = _wait(self.device) - started
        return Run(result, _wait(self.device) - begun)
