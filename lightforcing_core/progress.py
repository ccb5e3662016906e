"""Progress of the command: chunks of a video, bytes of a file."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from .generate import ChunkReport


class ChunkProgress:
    """Chunk, frames per second and time left, on stderr.

    A terminal gets a bar, anything else one line per chunk.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[chunk]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("loading", total=None, chunk="", rate="")
        self._started = 0.0
        self._frames = 0

    def __enter__(self) -> ChunkProgress:
        self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.stop()

    def loading(self, done: int, total: int) -> None:
        """Show how many bytes of the model are read."""
        self._bar.update(self._task, completed=done, total=total)

    def update(self, report: ChunkReport) -> None:
        """Show that a chunk is done."""
        self.chunk_done(report.index, report.num_chunks, report.pixel_frames, report.seconds)

    def chunk_done(self, index: int, num_chunks: int, pixel_frames: int, seconds: float) -> None:
        """Show that a chunk is done, from its number (from 0), its frames and the time it took."""
        now = time.perf_counter()
        if not self._frames:
            self._started = now - seconds
        self._frames += pixel_frames
        rate = f"{self._frames / (now - self._started):.1f} frames/s"
        done = index + 1
        if not self._console.is_terminal:
            self._console.print(f"chunk {done}/{num_chunks}: {rate}", highlight=False)
        self._bar.update(
            self._task,
            completed=done,
            total=num_chunks,
            chunk=f"chunk {done}/{num_chunks}",
            rate=rate,
            description="generating",
        )


class FileProgress:
    """A bar of bytes while a large file is read; nothing where there is no terminal."""

    def __init__(self, console: Console, what: str) -> None:
        self._bar = Progress(
            TextColumn(what),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(what, total=None)

    def __enter__(self) -> FileProgress:
        self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.stop()

    def update(self, done: int, total: int) -> None:
        """Show that so many bytes of all are read."""
        self._bar.update(self._task, completed=done, total=total)
