"""A page about a machine's speed, to be pasted into an issue: what was measured, on what, and where
the time of a video goes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .case import Run
from .common import device_name, machine_facts
from .kernel_parts import COPY, DECODE
from .profile import ProfileError, Timeline, profile_table

_GIB = 2**30
_LEAST_COLUMN = 11


@dataclass(frozen=True)
class Benchmark:
    """Videos that were made, and one that was profiled.

    Attributes:
        frames: pixel frames of a video.
        runs: those that count.
        rows: of `bench.profile.Profile.rows`, or of `whole_passes` where kernels could not be told
            apart; `unprofiled` says why, and is empty otherwise.
        peak_gib: GiB that torch held allocated on the device at the highest point; None on the CPU.
    """

    device: torch.device
    frames: int
    runs: Sequence[Run]
    rows: Sequence[Mapping[str, Any]]
    unprofiled: str = ""
    peak_gib: float | None = None
    settings: Mapping[str, str] = field(default_factory=dict)


def measure(
    make: Callable[[Callable[[str, int], None]], Run],
    device: torch.device,
    frames: int,
    repeats: int,
    settings: Mapping[str, str],
    *,
    decodes_beside: bool = False,
) -> Benchmark:
    """Make a video once to warm up, then as often as counts, then once under the profiler.

    Args:
        make: makes the video, and hands on marks as `bench.video.PassMarks` makes them.
        frames: pixel frames of a video.
        settings: what the report says about the video, by name.
        decodes_beside: on a stream of its own, so that work on other streams is that.
    """

    def unmarked(label: str, chunk: int) -> None:
        """Nobody listens."""

    make(unmarked)
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    runs = [make(unmarked) for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated(device) / _GIB if is_cuda else None
    # Else it is a host's that keeps weights elsewhere, and brings and casts them.
    timeline, reason = Timeline(device, beside=DECODE if decodes_beside else COPY), ""
    with timeline:
        make(timeline.mark)
        if is_cuda:
            torch.cuda.synchronize(device)
    try:
        rows = timeline.result().rows()
    except ProfileError as error:
        rows, reason = whole_passes(runs), str(error)
    return Benchmark(device, frames, runs, rows, reason, peak, settings)


def whole_passes(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Rows as of a profile, of what is known without one: median milliseconds of denoising, clean
    pass and decoding by chunk."""
    rows: list[dict[str, Any]] = []
    for chunk, times in enumerate(zip(*(run.chunks for run in runs), strict=True)):
        row: dict[str, Any] = {
            "denoise_ms": round(1e3 * statistics.median(t.denoise for t in times), 3),
            "clean_pass_ms": round(1e3 * statistics.median(t.clean for t in times), 3),
        }
        if times[0].decode is not None:
            row["decode_ms"] = round(1e3 * statistics.median(t.decode or 0 for t in times), 3)
        rows.append({"chunk": chunk, "wall_ms": round(sum(row.values()), 3), **row})
    whole = {key: round(sum(row[key] for row in rows), 3) for key in rows[0] if key != "chunk"}
    return [*rows, {"chunk": "all", **whole}]


def report_text(found: Benchmark) -> str:
    """The page."""
    facts = machine_facts(found.device)
    lines = [
        "Light Forcing benchmark",
        "",
        f"{'device':{_LEAST_COLUMN}}{device_name(found.device)}",
        f"{'versions':{_LEAST_COLUMN}}" + ", ".join(f"{k} {v}" for k, v in facts.items()),
        *(f"{name:{_LEAST_COLUMN}}{value}" for name, value in found.settings.items()),
        f"{'runs':{_LEAST_COLUMN}}{len(found.runs)} after one to warm up; medians, least to most",
        "",
        _speed(found.frames, [run.made for run in found.runs], "denoising and clean passes alone"),
    ]
    firsts = [run.first_frames for run in found.runs if run.first_frames is not None]
    if firsts:
        seconds = [run.seconds for run in found.runs]
        lines += [
            _speed(found.frames, seconds, "also decoding, every frame on the host"),
            f"{1e3 * statistics.median(firsts):8.0f} ms until the first chunk's frames lie on the "
            "host",
        ]
    if found.peak_gib is not None:
        lines.append(
            f"{found.peak_gib:8.2f} GiB at the highest point, all that torch held there included"
        )
    return "\n".join([*lines, "", *_chunk_table(found.runs), "", *_part_table(found)])


def _speed(frames: int, seconds: Sequence[float], includes: str) -> str:
    least, typical, most = (
        frames / max(s, 1e-9) for s in (max(seconds), statistics.median(seconds), min(seconds))
    )
    return f"{typical:8.1f} frames per second ({least:.1f} to {most:.1f}): {includes}"


def _chunk_table(runs: Sequence[Run]) -> list[str]:
    """Medians of each chunk, by the clock of the run."""
    has_decoding = runs[0].chunks[0].decode is not None
    lines = [
        f"{'chunk':>5}{'sparsity':>10}{'computed':>10}{'denoise':>12}{'clean pass':>12}"
        + (f"{'decode':>12}" if has_decoding else "")
    ]
    rows = whole_passes(runs)[:-1]
    for row, chunk in zip(rows, runs[0].chunks, strict=True):
        keys = ("denoise_ms", "clean_pass_ms", *(("decode_ms",) if has_decoding else ()))
        lines.append(
            f"{row['chunk'] + 1:>5}{100 * chunk.sparsity:>8.1f} %{100 * chunk.density:>8.1f} %"
            + "".join(f"{row[key]:>9.1f} ms" for key in keys)
        )
    return lines


def _part_table(found: Benchmark) -> list[str]:
    if found.unprofiled:
        return [f"Parts of a chunk are not told apart here: {found.unprofiled}."]
    return ["One more video under the profiler, milliseconds:", *profile_table(found.rows)]
