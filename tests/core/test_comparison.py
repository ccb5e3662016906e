"""The report of two runs says what they took, chunk by chunk."""

from __future__ import annotations

import math

import pytest

from lightforcing.lightforcing_core.comparison import ComparedRun, comparison_report
from lightforcing.lightforcing_core.rollout import ChunkStatistics
from lightforcing.lightforcing_core.video_quality import VideoQuality


def _run(seconds: float, densities: tuple[float, ...]) -> ComparedRun:
    run = ComparedRun()
    for index, density in enumerate(densities):
        statistics = ChunkStatistics(
            index=index,
            first_frame=3 * index,
            num_frames=3,
            steps=4,
            kv_frames=3 * (index + 1),
            sparsity=1 - density,
            density=density,
            forwards=5,
            denoise_seconds=seconds * 0.75,
            clean_seconds=seconds * 0.25,
            select_seconds=0.1,
            attend_seconds=0.3,
        )
        run.add(statistics, 9 if index == 0 else 12)
    return run


def test_totals_and_rows() -> None:
    dense, sparse = _run(2.0, (1.0, 1.0)), _run(0.5, (1.0, 0.25))
    quality = VideoQuality((math.inf,) * 9 + (30.0,) * 12, (1.0,) * 9 + (0.9,) * 12)
    report = comparison_report(dense, sparse, quality)
    assert report.speed_up == pytest.approx(4)
    lines = report.text.splitlines()
    assert lines[1].split() == ["dense", "4.00", "s", "0.80", "s", "5.2", "100.0", "%"]
    # 9 of 27 frame pairs are of the first chunk: (9 + 18 / 4) / 27.
    assert lines[2].split() == ["sparse", "1.00", "s", "0.80", "s", "21.0", "50.0", "%"]
    assert lines[3].split() == ["4.00", "x", "1.00", "x"]
    assert "PSNR 30.0 dB" in report.text and "9 of them equal" in report.text
    assert lines[-2].split()[-2:] == ["equal", "1.0000"]
    assert lines[-1].split()[-3:] == ["30.0", "dB", "0.9000"]


def test_given_frames_come_before_the_first_chunk() -> None:
    dense, sparse = _run(1.0, (1.0,)), _run(1.0, (0.5,))
    quality = VideoQuality((math.inf,) + (20.0,) * 9, (1.0,) + (0.5,) * 9)
    assert comparison_report(dense, sparse, quality).text.splitlines()[-1].endswith("0.5000")


def test_equal_videos_have_no_finite_psnr() -> None:
    run = _run(1.0, (1.0,))
    report = comparison_report(run, run, VideoQuality((math.inf,) * 9, (1.0,) * 9))
    assert "PSNR equal, SSIM 1.0000" in report.text and report.speed_up == 1
