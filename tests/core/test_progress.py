"""What a person sees while a video is made."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lightforcing.lightforcing_core.generate import ChunkReport
from lightforcing.lightforcing_core.progress import ChunkProgress
from lightforcing.lightforcing_core.rollout import ChunkStatistics


def report(index: int) -> ChunkReport:
    statistics = ChunkStatistics(index, 3 * index, 3, 4, 3, 0.0, 1.0, 4, 0.5, 0.1)
    return ChunkReport(index, 3, 12, statistics, decode_seconds=0.2)


@pytest.mark.parametrize("terminal", [True, False])
def test_chunk_rate_and_time_left_are_shown(terminal: bool) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100)
    with ChunkProgress(console) as progress:
        for index in range(3):
            progress.update(report(index))
    shown = stream.getvalue()
    assert "chunk 3/3" in shown
    assert "frames/s" in shown
    assert "None" not in shown
    if terminal:
        assert "00:00" in shown  # time left
    else:
        assert shown.count("\n") == 3
