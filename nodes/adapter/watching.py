"""Following a run from outside: what is told of it, and what may be changed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from ...lightforcing_core.chunk import Chunk
from ...lightforcing_core.kv_cache import CacheSpec
from ...lightforcing_core.rollout_settings import RolloutSettings
from ...lightforcing_core.schedule import Timeline
from ...lightforcing_core.sparse_settings import SparseSettings
from .forwards import ForwardTally
from .options import SparseChoice


@dataclass(frozen=True)
class RunInfo:
    """A run that is about to begin.

    Attributes:
        choice: what the Sparse Attention node said; None without one, and then nothing can be
            changed.
        settings: lengths, steps and window as they have come out.
        given_frames: latent frames the video begins with.
        spec: of the key/value cache: the model's layers and heads, tokens of a frame.
        forwards: what runs them, counted while the run goes on.
    """

    choice: SparseChoice | None
    settings: RolloutSettings
    given_frames: int
    spec: CacheSpec
    forwards: ForwardTally

    @property
    def timeline(self) -> Timeline:
        """The chunks to come."""
        return self.settings.timeline(self.given_frames)


class RunWatcher(Protocol):
    """Somebody who follows a run, and may change its sparsity between chunks."""

    def settings_for_chunk(self, chunk: int) -> SparseSettings | None:
        """Asked before every chunk, index from 0; None: dense. Block sizes must stay."""
        ...

    def chunk_done(self, chunk: Chunk) -> None:
        """Called with every chunk as soon as its last denoising step is done.

        `chunk.latents` are normalised, float32 [B, 16, frames, h, w], on the model's device.
        """
        ...


class PlainRun:
    """The watcher of a run that nobody follows: the node's settings hold throughout."""

    def __init__(self, info: RunInfo) -> None:
        self._choice = info.choice

    def settings_for_chunk(self, chunk: int) -> SparseSettings | None:
        choice = self._choice
        return choice.settings if choice is not None and choice.enabled else None

    def chunk_done(self, chunk: Chunk) -> None:
        pass


# Entered as the run begins, and left when it ends, however it ends.
Watch = Callable[[RunInfo], AbstractContextManager[RunWatcher]]


@contextlib.contextmanager
def unwatched(info: RunInfo) -> Iterator[RunWatcher]:
    """The `Watch` of runs that nobody follows."""
    yield PlainRun(info)
