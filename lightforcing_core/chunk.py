"""What a rollout hands out: finished chunks, and the forwards that a host runs for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import ChunkAttention
from .wan.forward import TextContext


@dataclass(frozen=True)
class ChunkStatistics:
    """What one chunk was and cost.

    Attributes:
        index: chunk, from 0.
        first_frame, num_frames: absolute latent frames.
        kv_frames: latent frames attention saw, the chunk's own included.
        sparsity: share of (query block, key block) pairs asked to be skipped, 0..1.
        density: share of pairs computed, 0..1, mean over heads, layers and denoising passes.
        forwards: forwards since the previous chunk was ready (clean passes included).
        denoise_seconds: denoising forwards.
        clean_seconds: clean passes of what came before this chunk (previous chunk or given
            frames).
        select_seconds, attend_seconds: of those forwards, in choosing blocks and in attending; what
            an engine replays is not taken apart and not counted.
    """

    index: int
    first_frame: int
    num_frames: int
    steps: int
    kv_frames: int
    sparsity: float
    density: float
    forwards: int
    denoise_seconds: float
    clean_seconds: float
    select_seconds: float = 0.0
    attend_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.denoise_seconds + self.clean_seconds

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": self.seconds}


@dataclass(frozen=True)
class Chunk:
    """A finished chunk.

    Attributes:
        latents: float32 [B, C, frames, h, w], normalised.
        attention: the run's; what it says (`SparseAttention.plans`) is of this chunk until the
            next one is asked for.
        ready: on CUDA, recorded when the latents were done. The chunk's clean pass may be under
            way behind them on the same stream; who uses another stream need only wait for this.
    """

    latents: Tensor
    statistics: ChunkStatistics
    attention: ChunkAttention
    ready: torch.cuda.Event | None = None


@dataclass(frozen=True)
class ModelCall:
    """One forward that a rollout needs, for a host that runs its models itself.

    Attributes:
        latents: noisy, float32 [B, C, F, h, w].
        timestep: of all frames, 0..1000.
        frames: their absolute latent frame indices.
        step: denoising step from 0; None for a clean pass, whose result nobody reads.
        velocity: the forward, to be called exactly once, where the host's model would run: x
            [B, C, F, h, w] in the forwards' dtype and the prompt, to the velocity in x's dtype.
    """

    latents: Tensor
    timestep: float
    frames: Sequence[int]
    step: int | None
    velocity: Callable[[Tensor, TextContext], Tensor]


# Runs a forward; returns clean latents, float32 [B, C, F, h, w].
ModelHost = Callable[[ModelCall], Tensor]
