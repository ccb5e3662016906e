"""A case's video with single parts of what makes it fast switched on or off."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from ..fast.decode import ChunkDecoder, DecodedChunk
from ..fast.engine import ForwardEngine
from ..fast.linears import eight_bit_obstacle, with_eight_bit_linears
from ..rollout import rollout
from ..sparse_settings import SparseSettings
from ..vae.streaming import StreamingDecoder
from ..video_io import frames_to_uint8
from .case import (
    ChunkTimes,
    RolloutCase,
    Run,
    free_memory,
    random_denoiser,
    random_prompt,
    random_vae,
    wait,
)

_FUSED = "fused" if "fused" in inspect.signature(ForwardEngine).parameters else "compiled"

# Told what the device does from here on, and of which chunk (from 0).
Mark = Callable[[str, int], None]


@dataclass(frozen=True)
class Parts:
    """What is switched on; without any, dense attention as it stands.

    Attributes:
        sparse: attention skips blocks.
        fused: what surrounds attention and products is fused.
        graphs: forwards are recorded as CUDA graphs.
        eight_bit: linear layers in eight bits.
        beside: chunks are decoded on a stream of their own while the next one is made.
    """

    sparse: bool = False
    fused: bool = False
    graphs: bool = False
    eight_bit: bool = False
    beside: bool = True

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this device cannot do it, or None."""
        if (self.fused or self.graphs) and device.type != "cuda":
            return f"fused kernels and CUDA graphs need a CUDA device, this one is {device}"
        return eight_bit_obstacle(device, dtype) if self.eight_bit else None


class Video:
    """Makes a case's video with some parts; holds weights, decoder and engine until `release`."""

    def __init__(
        self, case: RolloutCase, parts: Parts, sparse: SparseSettings, device: torch.device
    ) -> None:
        obstacle = parts.obstacle(device, case.dtype)
        if obstacle is not None:
            raise UserError(obstacle)
        self.case, self.parts, self.device = case, parts, device
        self.settings = case.settings(sparse if parts.sparse else None)
        tree: nn.Module = random_denoiser(case, device)
        if parts.eight_bit:
            tree = with_eight_bit_linears(tree)
        self.tree = tree
        self.text = random_prompt(case, tree, device)
        self.vae = random_vae(case, device)
        self.engine: ForwardEngine | None = None
        if parts.fused or parts.graphs:
            fused = {_FUSED: parts.fused}
            self.engine = ForwardEngine(tree, graphs=parts.graphs, keep=True, **fused)

    def release(self) -> None:
        """Free everything; the video cannot be made again."""
        if self.engine is not None:
            self.engine.release()
        del self.tree, self.text, self.vae, self.engine
        free_memory(self.device)

    def __call__(self, mark: Mark = lambda label, chunk: None) -> Run:
        """The whole video; `mark` is called at the start of every forward and every decoding."""
        begun = wait(self.device)
        noise, times = self.case.noise(self.device), []
        chunk, passes = 0, 0

        def before_pass() -> bool:
            nonlocal passes
            mark("denoise" if passes or not chunk else "clean", chunk)
            passes += 1
            return False

        mark("denoise", 0)
        with self._decoding() as decoding:
            for made in rollout(
                self.tree,
                self.settings,
                self.text,
                noise,
                dtype=self.case.dtype,
                engine=self.engine,
                should_stop=before_pass,
            ):
                times.append(made.statistics)
                if decoding is not None:
                    mark("decode", chunk)
                    decoding.submit(made.latents)
                chunk, passes = chunk + 1, 0
                if chunk < len(self.settings.chunk_lengths()):
                    mark("denoise", chunk)
            decoded = [] if decoding is None else [c.seconds for c in decoding.take(wait=True)]
        seconds = wait(self.device) - begun
        mark("end", chunk - 1)
        chunks = [
            ChunkTimes(
                part.denoise_seconds,
                part.clean_seconds,
                decoded[i] if decoded else None,
                part.sparsity,
                part.density,
            )
            for i, part in enumerate(times)
        ]
        first = decoding.finished[0] - begun if decoding is not None else None
        return Run(chunks, seconds, first)

    def _decoding(self) -> AbstractContextManager[_Beside | _InLine | None]:
        if self.vae is None:
            return nullcontext()
        decoder = self.vae.new_decoder()
        return (_Beside if self.parts.beside else _InLine)(decoder, self.device)


class _Beside(ChunkDecoder):
    """Notes when the frames of each chunk lay on the host, on `time.perf_counter`'s clock."""

    def __init__(self, decoder: StreamingDecoder, device: torch.device) -> None:
        super().__init__(decoder, device)
        self.finished: list[float] = []

    def _decode(self, latents: Tensor) -> DecodedChunk:
        done = super()._decode(latents)
        self.finished.append(time.perf_counter())
        return done


class _InLine:
    """Decodes where it is told to, before anything else goes on."""

    def __init__(self, decoder: StreamingDecoder, device: torch.device) -> None:
        self._decoder, self._device = decoder, device
        self._done: list[DecodedChunk] = []
        self.finished: list[float] = []

    def __enter__(self) -> _InLine:
        return self

    def __exit__(self, *_: object) -> None:
        self._done.clear()

    def submit(self, latents: Tensor) -> None:
        """Decode a chunk's latents to frames on the host."""
        started = wait(self._device)
        frames: np.ndarray = frames_to_uint8(self._decoder.decode(latents))
        self.finished.append(time.perf_counter())
        self._done.append(DecodedChunk(frames, self.finished[-1] - started))

    def take(self, *, wait: bool) -> Iterator[DecodedChunk]:
        """All of them."""
        yield from self._done
