"""Passes of a decoder as CUDA graphs, for a decoder that makes video after video.

A pass of a narrow decoder is a hundred launches, many of them shorter than it takes to ask for
them, and slower still to ask for beside a thread that denoises. A recording asks once. It names
addresses: latents and state are copied to them, frames are copied from them, and what lies between
stays in the recordings' own memory for as long as they do. A single video would not earn that back,
so nothing is recorded before the second one begins, and then what the first one ran.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..graphs import is_asynchronous, recording

log = logging.getLogger("lightforcing")

_MOST_RECORDINGS = 4
_LEAST_FREE = 0.25
"""Share of a GPU's memory that must be free: what recordings hold, nobody else can have."""


class _StreamState(Protocol):
    latents_seen: int

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...


State = TypeVar("State", bound=_StreamState)


class _Kind(NamedTuple):
    """Passes that launch the same."""

    shape: torch.Size
    dtype: torch.dtype
    at_start: bool


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    latents: Tensor
    frames: Tensor


class RecordedPasses(Generic[State]):
    """Runs passes, as recordings where there are any.

    Args:
        run: decodes latents [B, C, T, h, w] after a state, or at the start of a stream, to frames
            and a new state.
        make_state: of tensors and a number of latent frames seen.
        weights: what the network reads at present; recordings name where it is.
    """

    def __init__(
        self,
        run: Callable[[Tensor, State | None], tuple[Tensor, State]],
        make_state: Callable[[tuple[Tensor, ...], int], State],
        weights: Callable[[], Iterable[Tensor]],
    ) -> None:
        self._run = run
        self._make_state = make_state
        self._weights = weights
        self._addresses: list[int] = []
        self._recordings: dict[_Kind, _Recording] = {}
        self._held: tuple[Tensor, ...] = ()  # the state, where recordings find and leave it
        self._seen: dict[_Kind, None] = {}  # of this video, in order
        # What was made, on the meta device: of each kind, and the state.
        self._frames_like: dict[_Kind, Tensor] = {}
        self._like: tuple[Tensor, ...] = ()

    @property
    def num_recordings(self) -> int:
        """Graphs held at present."""
        return len(self._recordings)

    def __call__(self, latents: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Frames and the new state, which the next recorded pass writes over."""
        kind = _Kind(latents.shape, latents.dtype, state is None)
        self._seen[kind] = None
        recorded = self._recordings.get(kind)
        if recorded is not None and self._addresses != self._now():
            self.forget()
            recorded = None
        if recorded is None:
            frames, new = self._run(latents, state)
            self._frames_like[kind] = frames.to("meta")
            if [x.shape for x in self._like] != [x.shape for x in new.tensors]:
                self._like = tuple(x.to("meta") for x in new.tensors)
            return frames, new
        frames = torch.empty_like(recorded.frames)  # first: without room for it nothing is done
        recorded.latents.copy_(latents)
        if state is not None and state.tensors[0] is not self._held[0]:
            torch._foreach_copy_(list(self._held), list(state.tensors))
        recorded.graph.replay()
        frames.copy_(recorded.frames)
        seen = latents.shape[2] + (state.latents_seen if state else 0)
        return frames, self._make_state(self._held, seen)

    def forget(self) -> None:
        """Free what recordings hold."""
        self._recordings.clear()
        self._held = ()

    def record(self, stream: torch.cuda.Stream) -> None:
        """Record what the last video ran; the next one replays it. On the thread that decodes,
        while nobody else waits for the whole device, which would end a recording.

        Args:
            stream: the one that decoding is on.
        """
        wanted, self._seen = list(self._seen)[:_MOST_RECORDINGS], {}
        is_other = [x.shape for x in self._held] != [x.shape for x in self._like]
        if is_other or self._addresses != self._now():
            self.forget()
        missing = [kind for kind in wanted if kind not in self._recordings]
        if missing and is_asynchronous(stream.device):
            log.info("decoding is not recorded with the allocator cudaMallocAsync")
            return
        if not missing or not self._has_room(stream.device):
            return
        self._addresses = self._now()
        try:
            with torch.no_grad(), torch.cuda.device(stream.device):
                for kind in missing:
                    self._record(kind, stream)
        except RuntimeError as error:  # out of memory, or ended from outside
            self.forget()
            log.warning("decoding is not recorded as CUDA graphs: %s", error)

    def _now(self) -> list[int]:
        return [weight.data_ptr() for weight in self._weights()]

    def _has_room(self, device: torch.device) -> bool:
        free, total = torch.cuda.mem_get_info(device)
        return free >= _LEAST_FREE * total

    def _record(self, kind: _Kind, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            if not self._held:
                self._held = tuple(torch.empty_like(x, device=stream.device) for x in self._like)
            latents = torch.zeros(kind.shape, dtype=kind.dtype, device=stream.device)
            frames = torch.empty_like(self._frames_like[kind], device=stream.device)
        state = None if kind.at_start else self._make_state(self._held, 1)
        others = list(self._recordings.values())
        pool = others[0].graph.pool() if others else None
        graph = torch.cuda.CUDAGraph()
        with recording(graph, stream.device, pool, after_run=not others):
            self._run_into(frames, latents, state)
        self._recordings[kind] = _Recording(graph, latents, frames)
        log.debug("recorded a decoder's pass as a CUDA graph")

    def _run_into(self, frames: Tensor, latents: Tensor, state: State | None) -> None:
        """A pass that leaves nothing of its own, see `graphs`."""
        made, new = self._run(latents, state)
        frames.copy_(made)
        torch._foreach_copy_(list(self._held), list(new.tensors))
