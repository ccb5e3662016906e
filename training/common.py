"""What every training stage shares: the run's settings, its clock, its log, its files."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """How large the networks and the work are; `TINY` proves the code on a CPU.

    Attributes:
        decoder_widths, encoder_width: of the autoencoder.
        dim, ffn_dim, num_heads, num_layers: of the denoiser.
        pool_clips: clips of 81 frames in the pool of latents; pool_openings: of 9 frames.
        batch_clips, batch_openings: per optimizer step.
        autoencoder_batch: clips of `autoencoder_latents` latent frames per step.
        rollout_clips: clips per rollout in the distillation.
        latent_frames: length of a clip.
    """

    decoder_widths: tuple[int, int, int, int] = (128, 64, 32, 32)
    encoder_width: int = 32
    dim: int = 256
    ffn_dim: int = 640
    num_heads: int = 2
    num_layers: int = 7
    pool_clips: int = 8192
    pool_openings: int = 65536
    batch_clips: int = 16
    batch_openings: int = 256
    autoencoder_batch: int = 8
    autoencoder_latents: int = 5
    rollout_clips: int = 64
    latent_frames: int = 21


FULL = Sizes()
TINY = Sizes(
    decoder_widths=(16, 8, 8, 8),
    encoder_width=8,
    dim=24,
    ffn_dim=32,
    num_heads=2,
    num_layers=1,
    pool_clips=2,
    pool_openings=4,
    batch_clips=1,
    batch_openings=2,
    autoencoder_batch=1,
    autoencoder_latents=2,
    rollout_clips=1,
    latent_frames=6,
)


_AGREE_EVERY_STEPS = 20


def is_distributed() -> bool:
    """Whether several processes train together, each on a GPU of its own (torchrun's variables)."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def join_processes() -> int:
    """Join the other processes if there are any; returns this one's rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl")
    return torch.distributed.get_rank()


class Clock:
    """A stage's time budget; learning rates follow the share of it that is used."""

    def __init__(self, seconds: float, max_steps: int | None = None) -> None:
        self.seconds = seconds
        self.max_steps = max_steps
        self.step = 0
        self._started = time.monotonic()
        self._agreed: float | None = 0.0 if is_distributed() else None

    @property
    def spent(self) -> float:
        """Seconds of the budget used."""
        return self.used * self.seconds

    def restart(self) -> None:
        """Count from now, keeping the end: for when compilation is over."""
        now = time.monotonic()
        self.seconds -= now - self._started
        self._started = now

    @property
    def used(self) -> float:
        """Share of the budget used, 0..1, by time or by steps."""
        return self._agreed if self._agreed is not None else self._own_share()

    def _own_share(self) -> float:
        by_time = (time.monotonic() - self._started) / max(self.seconds, 1e-3)
        by_steps = self.step / self.max_steps if self.max_steps else 0.0
        return min(max(by_time, by_steps), 1.0)

    def tick(self) -> bool:
        """Count one step; False when the budget is spent."""
        self.step += 1
        if is_distributed() and self.step % _AGREE_EVERY_STEPS == 0:
            # All processes must take the same learning rate and stop at the same step.
            share = torch.tensor([self._own_share()], device="cuda")
            torch.distributed.broadcast(share, src=0)
            self._agreed = share.item()
        return self.used < 1.0


def learning_rate(peak: float, used: float, warm_up: float = 0.03) -> float:
    """Linear warm-up, then a half cosine to zero over the budget."""
    if used < warm_up:
        return peak * (0.05 + 0.95 * used / warm_up)
    return peak * 0.5 * (1 + math.cos(math.pi * (used - warm_up) / (1 - warm_up)))


class JsonLog:
    """Metrics as JSON lines, to a file and through `echo`."""

    def __init__(self, path: Path | None, echo: Callable[[str], None] | None = None) -> None:
        self.path = path
        self.echo = echo
        self._started = time.monotonic()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, stage: str, **values: object) -> None:
        """One line: the stage, seconds since the log was opened, and the values."""
        line = {"stage": stage, "elapsed": round(time.monotonic() - self._started, 1)}
        line |= {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
        text = json.dumps(line)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(text + "\n")
        if self.echo is not None:
            self.echo(text)


@dataclass(frozen=True)
class Run:
    """Where and how a stage runs."""

    device: torch.device
    seconds: float
    seed: int
    sizes: Sizes
    log: JsonLog
    max_steps: int | None = None
    rank: int = 0

    @property
    def fast(self) -> bool:
        """On a GPU: bf16 and compiled."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.fast else torch.float32

    def generator(self, stream: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(
            (self.seed * 64 + self.rank) * 1000 + stream
        )

    def clock(self) -> Clock:
        return Clock(self.seconds, self.max_steps)


def add_run_arguments(parser: argparse.ArgumentParser, *, seconds: float) -> None:
    """The options that every stage has."""
    parser.add_argument("--out", type=Path, required=True, help="weights file to write")
    parser.add_argument("--resume", type=Path, help="weights file to start from")
    parser.add_argument("--seconds", type=float, default=seconds, help="time budget")
    parser.add_argument("--max-steps", type=int, help="stop after so many steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to prove the code")
    parser.add_argument("--metrics", type=Path, help="JSON lines; default: beside --out")


def run_from_arguments(arguments: argparse.Namespace) -> Run:
    """Settings of a stage from the options of `add_run_arguments`; seeds torch."""
    torch.manual_seed(arguments.seed)
    rank = join_processes()
    if arguments.device.startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    log_path = arguments.metrics or arguments.out.with_suffix(".jsonl")
    return Run(
        device=torch.device(arguments.device),
        seconds=arguments.seconds,
        seed=arguments.seed,
        sizes=TINY if arguments.tiny else FULL,
        log=JsonLog(
            log_path if rank == 0 else None,
            lambda line: rank == 0 and sys.stdout.write(line + "\n") and sys.stdout.flush(),
        ),
        max_steps=arguments.max_steps,
        rank=rank,
    )


def save_weights(
    path: Path,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write weights under their final name only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    contiguous = {k: v.detach().to("cpu", dtype).contiguous() for k, v in tensors.items()}
    save_file(contiguous, partial, metadata=metadata)
    partial.replace(path)


def load_weights(module: nn.Module, path: Path) -> None:
    """Copy a file's tensors into a module, strictly."""
    module.load_state_dict(load_file(path))
