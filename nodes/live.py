"""Runs under way: their sliders may be moved, and whoever watches is told what each chunk was.

A `LiveRun` lives as long as its run. The registry holds runs by the ids of their nodes and belongs
to the server; nothing is kept of a run that ended.
"""

from __future__ import annotations

import base64
import contextlib
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..lightforcing_core.chunk import ChunkStatistics
from ..lightforcing_core.errors import UserError
from ..lightforcing_core.preview import FrameStrip
from ..lightforcing_core.schedule import Timeline
from ..lightforcing_core.sparse_settings import SparseSettings

START, CHUNK, FRAMES, END = (
    f"lightforcing.{event}" for event in ("start", "chunk", "frames", "end")
)
_STRIPS_KEPT = 32  # for a page that is loaded again in mid-run
# (event, data ready for JSON)
Send = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class RunPlan:
    """What a run is going to make.

    Attributes:
        timeline: its chunks.
        frame_tokens, num_layers: of the model at the video's size.
        frames_per_second: playback rate of the video.
    """

    timeline: Timeline
    frame_tokens: int
    num_layers: int
    frames_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, under the names that a forecast is asked for with."""
        return {
            "chunk_frames": list(self.timeline.chunk_frames),
            "given_frames": self.timeline.given_frames,
            "window_frames": self.timeline.window_frames,
            "frame_tokens": self.frame_tokens,
            "num_layers": self.num_layers,
            "frames_per_second": self.frames_per_second,
        }


class LiveRun:
    """One run: its settings, which another thread may change, and the marks of its chunks."""

    def __init__(
        self,
        node_ids: Sequence[str],
        plan: RunPlan,
        settings: SparseSettings | None,
        *,
        enabled: bool = True,
        send: Send = lambda event, data: None,
    ) -> None:
        """
        Args:
            node_ids: of the nodes that show this run: the sampler and its Sparse Attention.
            settings: None: the model has no Sparse Attention node, so nothing can be changed.
            enabled: that node's switch.
            send: tells the page; called in the run's thread.
        """
        self.node_ids = tuple(node_ids)
        self.run_id = uuid.uuid4().hex
        self._plan = plan
        self._send = send
        self._lock = threading.Lock()
        self._settings = settings
        self._enabled = enabled
        self._next_chunk = 0
        self._used: dict[int, dict[str, Any] | None] = {}  # by chunk
        self._marks: list[dict[str, Any]] = []
        self._strips: deque[dict[str, Any]] = deque(maxlen=_STRIPS_KEPT)
        self._strips_made = 0

    def change(self, settings: SparseSettings, *, enabled: bool) -> int:
        """Other settings from the next chunk on.

        Returns: the first chunk, from 0, that will use them.
        Raises:
            UserError: this run cannot take them.
        """
        with self._lock:
            if self._settings is None:
                raise UserError(
                    "this run's model has no Sparse Attention node, so it stays dense; add one "
                    "and run again"
                )
            self._settings.check_change(settings)
            self._settings, self._enabled = settings, enabled
            return self._next_chunk

    def settings_for_chunk(self, chunk: int) -> SparseSettings | None:
        """What the chunk (from 0) that begins now uses; None: dense."""
        with self._lock:
            self._next_chunk = chunk + 1
            used = self._settings if self._enabled else None
            self._used[chunk] = None if used is None else asdict(used)
            return used

    def chunk_done(
        self, statistics: ChunkStatistics, *, pixel_frames: int, seconds: float | None = None
    ) -> None:
        """Tell that a chunk is ready.

        Args:
            pixel_frames: frames of video it is.
            seconds: that it took, decoding included; None: what sampling took.
        """
        seconds = statistics.seconds if seconds is None else seconds
        mark: dict[str, Any] = {
            "index": statistics.index,
            "num_chunks": self._plan.timeline.num_chunks,
            "sparsity": statistics.sparsity,
            "density": statistics.density,
            "seconds": seconds,
            "frames": pixel_frames,
            "frames_per_second": pixel_frames / max(seconds, 1e-9),
        }
        with self._lock:
            # The next chunk may have begun with others.
            mark["settings"] = self._used.pop(statistics.index, None)
            self._marks.append(mark)
        self._tell(CHUNK, mark)

    def frames_made(self, chunk: int | None, strips: Sequence[FrameStrip]) -> None:
        """Show frames of a chunk, from 0; None: of the given ones."""
        for strip in strips:
            data = {
                "number": self._strips_made,
                "chunk": chunk,
                "frames": strip.frames,
                "width": strip.width,
                "height": strip.height,
                "jpeg": base64.b64encode(strip.jpeg).decode(),
            }
            self._strips_made += 1
            with self._lock:
                self._strips.append(data)
            self._tell(FRAMES, data)

    def started(self) -> None:
        """Tell that the run begins."""
        self._tell(START, self.state())

    def ended(self, *, finished: bool) -> None:
        """Tell that the run is over, to its end or not."""
        self._tell(END, {"finished": finished})

    def state(self) -> dict[str, Any]:
        """Ready for JSON: the plan, the marks so far and the settings of the next chunk."""
        with self._lock:
            return {
                "node_ids": list(self.node_ids),
                "run_id": self.run_id,
                "plan": self._plan.to_dict(),
                "num_chunks": self._plan.timeline.num_chunks,
                "next_chunk": self._next_chunk,
                "enabled": self._enabled,
                "settings": None if self._settings is None else asdict(self._settings),
                "chunks": list(self._marks),
            }

    def strips(self) -> list[dict[str, Any]]:
        """The latest frames, as they were sent."""
        with self._lock:
            return list(self._strips)

    @property
    def marks(self) -> list[dict[str, Any]]:
        """What each chunk so far used and got."""
        with self._lock:
            return list(self._marks)

    def _tell(self, event: str, data: dict[str, Any]) -> None:
        self._send(event, {"node_ids": list(self.node_ids), "run_id": self.run_id, **data})


class LiveRuns:
    """The runs under way, by the ids of their nodes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_node: dict[str, LiveRun] = {}

    def get(self, node_id: str) -> LiveRun:
        """The run that a node takes part in.

        Raises:
            KeyError: the node is not running.
        """
        with self._lock:
            return self._by_node[node_id]

    def all(self) -> list[LiveRun]:
        """Every run, once."""
        with self._lock:
            return list(dict.fromkeys(self._by_node.values()))

    @contextlib.contextmanager
    def holding(self, run: LiveRun) -> Iterator[LiveRun]:
        """Register a run for the time of the block, and tell of its beginning and its end."""
        with self._lock:
            self._by_node |= dict.fromkeys(run.node_ids, run)
        finished = False
        try:
            run.started()
            yield run
            finished = True
        finally:
            with self._lock:
                for node_id in run.node_ids:
                    if self._by_node.get(node_id) is run:
                        del self._by_node[node_id]
            run.ended(finished=finished)
