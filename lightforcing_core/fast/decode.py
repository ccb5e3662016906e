"""Decoding beside denoising: on a stream and a thread of its own, frames to pinned memory.

The chunk that was just denoised is decoded while the next one is made. At most `depth` chunks wait,
so a slow decoder holds the rollout back instead of filling the memory. On the CPU, where both
would fight over the same cores, chunks are decoded when they are handed in.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..graphs import beside_recordings
from ..vae.streaming import StreamingDecoder
from ..video_io import frames_to_uint8

Side = tuple[torch.cuda.Stream, ThreadPoolExecutor]
"""A stream, and the one thread that launches on it."""


@dataclass(frozen=True)
class DecodedChunk:
    """Frames uint8 [t, H, W, 3] on the host, and the seconds their decoding took."""

    frames: np.ndarray
    seconds: float


class ChunkDecoder:
    """Decodes the chunks of one video in order. Use it as a context manager.

    Errors of decoding are raised where the chunk's frames are taken.
    """

    def __init__(
        self,
        decoder: StreamingDecoder,
        device: torch.device,
        *,
        depth: int = 2,
        side: Side | None = None,
    ) -> None:
        """
        Args:
            decoder: at the start of its video. What it keeps between chunks belongs to its side
                stream from then on, so all of a video is decoded here.
            device: where its network is.
            depth: chunks that may wait for their decoding.
            side: where to decode; None: on a GPU beside, where the decoder's other videos are.
        """
        self._decoder = decoder
        self._device = device
        self._depth = depth
        self._pending: deque[Future[DecodedChunk]] = deque()
        self._stream: torch.cuda.Stream | None = None
        self._pool: ThreadPoolExecutor | None = None
        if side is not None:
            self._stream, self._pool = side
        elif device.type == "cuda":
            self._stream, self._pool = decoder.side_stream(device), decoder.side_thread()
            decoder.record()

    def __enter__(self) -> ChunkDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        for future in self._pending:
            future.cancel()
        if self._pool is not None:
            self._pool.submit(int).result()  # after what has begun, also if nobody took it
        self._pending.clear()

    def submit(self, latents: Tensor, ready: torch.cuda.Event | None = None) -> None:
        """Hand in the next chunk's latents, [1, 16, T, h, w]; waits while `depth` chunks wait.

        Args:
            ready: recorded when the latents were; None: they are what the current stream has
                computed by now.
        """
        if self._pool is None or self._stream is None:
            done: Future[DecodedChunk] = Future()
            done.set_result(self._decode(latents))
            self._pending.append(done)
            return
        unfinished = [future for future in self._pending if not future.done()]
        if len(unfinished) >= self._depth:
            unfinished[-self._depth].exception()  # waits; it is raised where frames are taken
        if ready is None:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))
        latents.record_stream(self._stream)
        self._pending.append(self._pool.submit(self._decode_beside, latents, ready))

    def take(self, *, wait: bool) -> Iterator[DecodedChunk]:
        """Chunks that are decoded, oldest first; with `wait` all that were handed in."""
        while self._pending and (wait or self._pending[0].done()):
            yield self._pending.popleft().result()

    def _decode_beside(self, latents: Tensor, ready: torch.cuda.Event) -> DecodedChunk:
        assert self._stream is not None
        with (
            beside_recordings(self._device),
            torch.cuda.device(self._device),
            torch.cuda.stream(self._stream),
        ):
            self._stream.wait_event(ready)
            return self._decode(latents)

    def _decode(self, latents: Tensor) -> DecodedChunk:
        started = time.perf_counter()
        frames = frames_to_uint8(self._decoder.decode(latents))
        return DecodedChunk(frames, time.perf_counter() - started)
