"""Runs that a page can follow: what a sampler needs to know of a `LiveRun`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..lightforcing_core.chunk import Chunk
from ..lightforcing_core.layout import TEMPORAL_COMPRESSION
from ..lightforcing_core.sparse_settings import SparseSettings
from .adapter.watching import RunInfo, RunWatcher, Watch
from .live import LiveRun, RunPlan
from .routes import live_run

FRAME_RATE = 16.0  # frames per second that Wan models are trained at


@contextlib.contextmanager
def followed(
    node_id: str, info: RunInfo, frames_per_second: float = FRAME_RATE
) -> Iterator[LiveRun]:
    """The live run of a sampler's node and of the Sparse Attention node before it."""
    spec, choice = info.spec, info.choice
    plan = RunPlan(info.timeline, spec.frame_tokens, spec.num_layers, frames_per_second)
    if choice is None:
        ids, settings, enabled = [node_id], None, False
    else:
        ids, settings, enabled = [choice.node_id, node_id], choice.settings, choice.enabled
    with live_run(ids, plan, settings, enabled=enabled) as run:
        yield run


class _Follower:
    """A `RunWatcher` that tells a page of every chunk."""

    def __init__(self, run: LiveRun) -> None:
        self._run = run

    def settings_for_chunk(self, chunk: int) -> SparseSettings | None:
        return self._run.settings_for_chunk(chunk)

    def chunk_done(self, chunk: Chunk) -> None:
        statistics = chunk.statistics
        frames = TEMPORAL_COMPRESSION * statistics.num_frames
        if statistics.first_frame == 0:
            frames -= TEMPORAL_COMPRESSION - 1
        self._run.chunk_done(statistics, pixel_frames=frames)


def watch_live(node_id: str) -> Watch:
    """For a sampler whose node has this id: sliders act in mid-run, and its chunks are told of."""

    @contextlib.contextmanager
    def watch(info: RunInfo) -> Iterator[RunWatcher]:
        with followed(node_id, info) as run:
            yield _Follower(run)

    return watch
