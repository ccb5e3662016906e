"""Decoding of a run's chunks beside its sampling, where ComfyUI's memory management allows it.

A chunk is decoded by another thread on another CUDA stream as soon as its last denoising step is
done, so its frames wait neither for its clean pass nor for the next chunk. Room for that is asked
of ComfyUI with the run's own; the VAE's weights stay where they are while a chunk is decoded
(`memory.HeldPatcher`). Where the VAE or the pictures are elsewhere, chunks are decoded where the
run hands them in.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import comfy.model_management
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...lightforcing_core.fast.decode import ChunkDecoder, DecodedChunk, Side
from ...lightforcing_core.video_io import frames_to_uint8
from .memory import is_dynamic, is_on, weights_in_use
from .video_vae import StreamingVAE

T = TypeVar("T")
# Gets what was handed in with a chunk, its frames as the decoder made them, the same uint8
# [t, H, W, 3] on the host, and the seconds that both took.
Show = Callable[[T, Tensor, np.ndarray, float], None]


def beside_obstacle(model: ModelPatcher, vae: StreamingVAE) -> str | None:
    """Why chunks cannot be decoded beside the sampling of a MODEL; None: they can.

    Args: vae: loaded.
    """
    place = vae.video_vae.device
    if place.type != "cuda":
        return f"the VAE is on {place}"
    weights = vae.video_vae.network.parameters()
    if not is_on(place, model.load_device):
        return f"the VAE is on {place}, the model on {model.load_device}"
    if not all(is_on(weight.device, place) for weight in weights):
        return "a part of the VAE is offloaded"
    if is_dynamic(model):
        return "ComfyUI brings the model's weights as they are needed"
    if comfy.model_management.intermediate_device().type != "cpu":
        return "pictures stay on the GPU"
    return None


@contextlib.contextmanager
def decoding(model: ModelPatcher, vae: StreamingVAE, show: Show[T]) -> Iterator[BesideDecoder[T]]:
    """A decoder for the chunks of one video of a MODEL; when the block is left, all are decoded.

    After an error of the run too, for finished chunks are part of what is kept of the video.

    Args:
        vae: loaded.
        show: called with every chunk as soon as it is decoded, one after the other in their order,
            possibly in another thread.
    """
    with BesideDecoder(vae, show, beside=beside_obstacle(model, vae) is None) as decoder:
        try:
            yield decoder
        except Exception:
            # Why the run ended matters more than why one of its chunks could not be decoded.
            with contextlib.suppress(Exception):
                decoder.finish()
            raise
        decoder.finish()


class BesideDecoder(ChunkDecoder, Generic[T]):
    """A `ChunkDecoder` that shows every chunk from the thread that decodes it.

    After a chunk that cannot be decoded or shown, none that follows is.
    """

    def __init__(self, vae: StreamingVAE, show: Show[T], *, beside: bool) -> None:
        """As for `decoding`; beside: whether on a stream of its own."""
        device = vae.video_vae.device
        # On the CPU, what is handed in is decoded at once.
        place, side = (device, _side(device)) if beside else (torch.device("cpu"), None)
        super().__init__(vae.new_decoder(), place, side=side)
        self.is_beside = beside
        self._place = device
        self._show = show
        self._handed_in: deque[T] = deque()
        self._has_failed = False
        # A setting of a thread; nodes run in it, and what it makes cannot be written outside.
        self._in_inference = torch.is_inference_mode_enabled()

    def hand_in(self, what: T, latents: Tensor, ready: torch.cuda.Event | None = None) -> None:
        """The next chunk's latents, and what to show with its frames; as `submit`.

        Raises:
            UserError: a chunk before this one could not be decoded or shown.
        """
        self._raise_errors(wait=False)
        self._handed_in.append(what)
        self.submit(latents.to(self._place) if self.is_beside else latents, ready)
        self._raise_errors(wait=False)

    def finish(self) -> None:
        """Wait until all that was handed in is shown; heeds interrupts.

        Raises:
            UserError: a chunk could not be decoded or shown.
        """
        self._raise_errors(wait=True)

    def _raise_errors(self, *, wait: bool) -> None:
        for _ in self.take(wait=wait):
            if wait:
                comfy.model_management.throw_exception_if_processing_interrupted()

    def _decode(self, latents: Tensor) -> DecodedChunk:
        what = self._handed_in.popleft()
        if self._has_failed:
            raise RuntimeError("a chunk before this one could not be decoded")
        try:
            with torch.inference_mode(self._in_inference):
                started = time.perf_counter()
                with weights_in_use():
                    frames = self._decoder.decode(latents)
                    pixels = frames_to_uint8(frames)  # waits for the device
                seconds = time.perf_counter() - started
                self._show(what, frames, pixels, seconds)
        except BaseException:
            self._has_failed = True
            raise
        return DecodedChunk(pixels, seconds)


@functools.cache
def _side(device: torch.device) -> Side:
    """Stream and thread of all videos: memory that was freed on one stream serves no other, and
    cuDNN plans anew for each thread, which takes longer than a chunk. Idle between videos."""
    return torch.cuda.Stream(device), ThreadPoolExecutor(1, "lightforcing-decode")
