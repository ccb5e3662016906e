"""Two runs of the same video, dense and sparse: what each took, and a report in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean

from .chunk import ChunkStatistics
from .video_quality import VideoQuality


@dataclass
class ComparedRun:
    """The chunks of one run, as they come, and how many frames of video each is."""

    chunks: list[ChunkStatistics] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)

    def add(self, statistics: ChunkStatistics, pixel_frames: int) -> None:
        """The next chunk."""
        self.chunks.append(statistics)
        self.frames.append(pixel_frames)

    @property
    def seconds(self) -> float:
        """Sampling, without decoding."""
        return sum(chunk.seconds for chunk in self.chunks)

    @property
    def attend_seconds(self) -> float:
        """In self-attention, choosing blocks included."""
        return sum(chunk.attend_seconds + chunk.select_seconds for chunk in self.chunks)

    @property
    def density(self) -> float:
        """Share of all pairs that were computed, 0..1."""
        pairs = [chunk.num_frames * chunk.kv_frames for chunk in self.chunks]
        kept = (n * chunk.density for n, chunk in zip(pairs, self.chunks, strict=True))
        return sum(kept) / sum(pairs)


@dataclass(frozen=True)
class ComparisonReport:
    """A comparison in words, and sampling time dense divided by sparse."""

    text: str
    speed_up: float


def comparison_report(
    dense: ComparedRun, sparse: ComparedRun, quality: VideoQuality
) -> ComparisonReport:
    """What came of two runs of the same chunks.

    Args: quality: of the sparse video against the dense one; it may begin with given frames.
    """
    speed_up = dense.seconds / max(sparse.seconds, 1e-9)
    attention = dense.attend_seconds / max(sparse.attend_seconds, 1e-9)
    frames = sum(dense.frames)
    lines = [
        f"{'':8}{'sampling':>10}{'attention':>11}{'frames/s':>10}{'computed':>10}",
        *(
            f"{name:8}{run.seconds:>8.2f} s{run.attend_seconds:>9.2f} s"
            f"{frames / max(run.seconds, 1e-9):>10.1f}{100 * run.density:>8.1f} %"
            for name, run in (("dense", dense), ("sparse", sparse))
        ),
        f"{'':8}{speed_up:>8.2f} x{attention:>9.2f} x",
        "",
        f"PSNR {_decibel(quality.mean_psnr)}, SSIM {quality.mean_ssim:.4f} "
        f"(mean of {len(quality.ssim)} frames, {quality.equal_frames} of them equal)",
        "",
        f"{'chunk':>5}{'sparsity':>10}{'computed':>10}{'dense':>10}{'sparse':>10}{'PSNR':>10}"
        f"{'SSIM':>9}",
    ]
    first = len(quality.ssim) - frames
    pairs = zip(dense.chunks, sparse.chunks, dense.frames, strict=True)
    for of_dense, of_sparse, count in pairs:
        own = slice(first, first + count)
        first += count
        different = [value for value in quality.psnr[own] if not math.isinf(value)]
        psnr = _decibel(fmean(different) if different else math.inf)
        lines.append(
            f"{of_sparse.index + 1:>5}{100 * of_sparse.sparsity:>8.1f} %"
            f"{100 * of_sparse.density:>8.1f} %{of_dense.seconds:>8.2f} s"
            f"{of_sparse.seconds:>8.2f} s{psnr:>10}{fmean(quality.ssim[own]):>9.4f}"
        )
    return ComparisonReport("\n".join(lines), speed_up)


def _decibel(psnr: float) -> str:
    return "equal" if math.isinf(psnr) else f"{psnr:.1f} dB"
