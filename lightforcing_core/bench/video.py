"""A case's video with single parts of what makes it fast switched on or off."""

from __future__ import annotations

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
from ..fast.operations import fused_obstacles
from ..rollout import rollout
from ..rollout_settings import RolloutSettings
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

# Told what the device does from here on, and of which chunk (from 0).
Mark = Callable[[str, int], None]


@dataclass(frozen=True)
class Parts:
    """What is switched on; without any, dense attention as it stands.

    Attributes:
        sparse: attention skips blocks.
        fused: what surrounds attention and products is fused.
        graphs: forwards, fused ones only, are recorded as CUDA graphs.
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
        if self.fused or self.graphs:
            if obstacles := fused_obstacles(device, dtype):
                return "; ".join(obstacles)
            if not self.fused:
                return "the engine records fused forwards only"
        return eight_bit_obstacle(device, dtype) if self.eight_bit else None


class PassMarks:
    """Marks the passes of a run by their number: a chunk's steps, then its clean pass, which counts
    as the next chunk's. A rollout may ask for that pass before it hands the chunk out."""

    def __init__(self, mark: Mark, settings: RolloutSettings) -> None:
        """Args: settings of the video, which nothing is given to."""
        self._mark, self._steps = mark, settings.chunk_steps()
        self._chunk, self._passes = 0, 0  # of the coming pass
        self._done = 0  # chunks
        mark("denoise", 0)

    def before_pass(self) -> bool:
        """Before every forward. Never asks to stop, for who wants to know that too."""
        is_clean = self._passes == self._steps[self._chunk]
        if is_clean:
            self._chunk, self._passes = self._chunk + 1, 0
        else:
            self._passes += 1
        self._mark("clean" if is_clean else "denoise", self._chunk)
        return False

    def before_decoding(self) -> None:
        """The chunk that is handed out will be decoded."""
        self._mark("decode", self._done)

    def chunk_done(self) -> None:
        """What follows belongs to the next chunk; after the last one still to that."""
        self._done += 1
        if self._done < len(self._steps):
            self._mark("denoise", self._done)

    def end(self) -> None:
        """Everything lies on the host."""
        self._mark("end", len(self._steps) - 1)


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
        vae = random_vae(case, device)
        self.decoder = None if vae is None else vae.new_decoder()
        self.engine: ForwardEngine | None = None
        if parts.fused or parts.graphs:
            self.engine = ForwardEngine(tree, graphs=parts.graphs, keep=True)

    def release(self) -> None:
        """Free everything; the video cannot be made again."""
        if self.engine is not None:
            self.engine.release()
        del self.tree, self.text, self.decoder, self.engine
        free_memory(self.device)

    def __call__(self, mark: Mark = lambda label, chunk: None) -> Run:
        """The whole video; `mark` is called at the start of every forward and every decoding."""
        begun = wait(self.device)
        noise, times = self.case.noise(self.device), []
        marks = PassMarks(mark, self.settings)
        with self._decoding() as decoding:
            for made in rollout(
                self.tree,
                self.settings,
                self.text,
                noise,
                dtype=self.case.dtype,
                engine=self.engine,
                should_stop=marks.before_pass,
            ):
                times.append(made.statistics)
                if decoding is not None:
                    marks.before_decoding()
                    decoding.submit(made.latents, made.ready)
                marks.chunk_done()
            decoded = [] if decoding is None else [c.seconds for c in decoding.take(wait=True)]
        seconds = wait(self.device) - begun
        marks.end()
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
        if self.decoder is None:
            return nullcontext()
        self.decoder.reset()
        return (_Beside if self.parts.beside else _InLine)(self.decoder, self.device)


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

    def submit(self, latents: Tensor, ready: torch.cuda.Event | None = None) -> None:
        """Decode a chunk's latents to frames on the host, once the device has done all before."""
        started = wait(self._device)
        frames: np.ndarray = frames_to_uint8(self._decoder.decode(latents))
        self.finished.append(time.perf_counter())
        self._done.append(DecodedChunk(frames, self.finished[-1] - started))

    def take(self, *, wait: bool) -> Iterator[DecodedChunk]:
        """All of them."""
        yield from self._done
