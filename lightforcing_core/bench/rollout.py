"""`lightforcing bench rollout`: whole videos at the real shape, dense, sparse and a plain loop.

Weights are random, which changes nothing about speed. Each method has the device to itself: it
builds its own weights, makes a video to warm up, one for its memory and those that count, and gives
everything back. All decode every chunk to frames on the host with the same weights: the plain
loop in plain torch after each chunk, ours with its kernels beside the next.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from ..errors import UserError
from ..sparse_settings import SparseSettings
from ..timesteps import SELF_FORCING_STEPS
from .case import NO_DECODER, RolloutCase, Run, free_memory, peak_memory
from .common import device_name, machine_facts
from .plain_loop import PlainLoop
from .video import Parts, Video

log = logging.getLogger("lightforcing")

PLAIN_LOOP = "plain loop"
METHODS = {
    "dense": Parts(),
    "dense fast": Parts(fused=True, graphs=True),
    "sparse": Parts(sparse=True),
    "sparse fast": Parts(sparse=True, fused=True, graphs=True),
    "sparse fp8": Parts(sparse=True, fused=True, graphs=True, eight_bit=True),
}
"""Ours by name; 'sparse fp8' is the speed preset."""
_LEAST_HELD_GIB = 0.25
"""What torch counts and no method holds: workspaces of cuBLAS, on Hopper 32 MiB for each thread
and stream that multiplied, of which methods add some; 0.13 GiB were seen on an H200."""
_FASTEST = ("sparse fp8", "sparse fast", "sparse")  # the first that can run


class Making(Protocol):
    """Makes a case's video again and again, until it is released."""

    def __call__(self) -> Run: ...

    def release(self) -> None: ...


def bench_rollout(
    cases: Sequence[RolloutCase],
    device: torch.device,
    sparse: SparseSettings,
    repeats: int = 3,
    methods: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure methods on every case.

    Args: methods: names of PLAIN_LOOP and METHODS; none: all that can run here.

    Returns:
        `rows` (one per case, method and chunk, and one with chunk 'all', see `video_row`),
        `left_out` (why a method was not measured, by name), `device`, `versions`.

    Raises:
        UserError: a method that was asked for cannot run here.
    """
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for case in cases:
        chosen, missing = choose_methods(case, device, methods)
        left_out |= missing
        for name in chosen:
            making = build(name, case, sparse, device)
            try:
                rows += _rows(case, name, making, repeats, device)
            finally:
                making.release()
                del making
                _check_released(name, device)
    return {
        "device": device_name(device),
        "versions": machine_facts(device),
        "rows": rows,
        "left_out": left_out,
    }


def _check_released(name: str, device: torch.device) -> None:
    """Memory that a method leaves behind would be counted as the next one's."""
    free_memory(device)
    held = torch.cuda.memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    if held > _LEAST_HELD_GIB:
        log.warning("'%s' left %.2f GiB on the device, counted in what follows", name, held)


def build(name: str, case: RolloutCase, sparse: SparseSettings, device: torch.device) -> Making:
    """What makes the video of a case by a method."""
    if name == PLAIN_LOOP:
        return PlainLoop(case, device)
    return Video(case, METHODS[name], sparse, device)


def choose_methods(
    case: RolloutCase, device: torch.device, asked: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """Names of the methods to measure, and why the others cannot run.

    Raises:
        UserError: no such method, or one that was asked for cannot run.
    """
    names = [PLAIN_LOOP, *METHODS]
    unknown = [name for name in asked if name not in names]
    if unknown:
        raise UserError(f"no method '{unknown[0]}'; choose among {', '.join(names)}")
    missing = {name: parts.obstacle(device, case.dtype) for name, parts in METHODS.items()}
    if case.window_frames != -1:
        missing[PLAIN_LOOP] = "it keeps the whole history, and this video has a window"
    reasons = {name: reason for name, reason in missing.items() if reason is not None}
    wrong = [name for name in asked if name in reasons]
    if wrong:
        possible = ", ".join(name for name in names if name not in reasons)
        raise UserError(
            f"the method '{wrong[0]}' cannot be measured here: {reasons[wrong[0]]}; choose among "
            f"{possible}"
        )
    return [name for name in asked or names if name not in reasons], {} if asked else reasons


def fastest(case: RolloutCase, device: torch.device) -> str:
    """The fastest method that this device can run."""
    return next(name for name in _FASTEST if not METHODS[name].obstacle(device, case.dtype))


def timed(make: Callable[[], Run], repeats: int) -> list[Run]:
    """Videos in a row after two that are not counted: the first compiles, records forwards and
    fills caches, and before the second the decoder records what the first one ran."""
    make()
    make()
    return [make() for _ in range(repeats)]


def _rows(
    case: RolloutCase, name: str, make: Making, repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    make()
    peaks = peak_memory(make, device)  # a video that warms up, too
    samples = [make() for _ in range(repeats)]
    typical = sorted(samples, key=lambda run: run.made)[len(samples) // 2]
    facts = {"method": name, "width": case.size.width, "height": case.size.height}
    rows: list[dict[str, Any]] = [
        {
            **facts,
            "chunk": i,
            "denoise_ms": round(chunk.denoise * 1e3, 2),
            "clean_ms": round(chunk.clean * 1e3, 2),
            "decode_ms": None if chunk.decode is None else round(chunk.decode * 1e3, 2),
            "sparsity": round(chunk.sparsity, 4),
            "density": round(chunk.density, 4),
        }
        for i, chunk in enumerate(typical.chunks)
    ]
    rows.append({**facts, **video_row(case, samples, typical), **peaks})
    log.info("%s", rows[-1])
    return rows


def video_row(case: RolloutCase, samples: Sequence[Run], typical: Run) -> dict[str, Any]:
    """A video in numbers: medians, with the least and the most of all runs.

    `frames_per_second` counts denoising and clean passes, `frames_per_second_decoded` all from the
    start until the last frame lies on the host; `includes` says so in words.
    """
    decodes = [chunk.decode for chunk in typical.chunks if chunk.decode is not None]
    made = spread("seconds", [run.made for run in samples])
    row: dict[str, Any] = {
        "chunk": "all",
        "frames": case.frames,
        "window_frames": case.window_frames,
        "sink_frames": case.sink_frames,
        "denoise_ms": round(sum(chunk.denoise for chunk in typical.chunks) * 1e3, 2),
        "clean_ms": round(sum(chunk.clean for chunk in typical.chunks) * 1e3, 2),
        "decode_ms": round(sum(decodes) * 1e3, 2) if decodes else None,
        "decoder": case.decoder,
        "runs": len(samples),
        **made,
        "frames_per_second": round(case.frames / made["seconds"], 2),
    }
    if case.decoder != NO_DECODER:
        shown = spread("seconds_decoded", [run.seconds for run in samples])
        row |= shown
        row["frames_per_second_decoded"] = round(case.frames / shown["seconds_decoded"], 2)
        firsts = [run.first_frames * 1e3 for run in samples if run.first_frames is not None]
        row |= spread("first_frames_ms", firsts, digits=2)
    growths = [run.growth for run in samples if run.growth is not None]
    row["last_over_second_chunk"] = round(statistics.median(growths), 3) if growths else None
    row["includes"] = _includes(case, len(typical.chunks))
    return row


def spread(name: str, values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median, least and most under a name, `_min` and `_max`."""
    return {
        name: round(statistics.median(values), digits),
        f"{name}_min": round(min(values), digits),
        f"{name}_max": round(max(values), digits),
    }


def _includes(case: RolloutCase, chunks: int) -> str:
    made = f"{len(SELF_FORCING_STEPS)} steps of {chunks} chunks; {chunks - 1} clean passes"
    if case.decoder != NO_DECODER:
        made += f"; decoded: also {case.decoder} and frames on the host"
    return f"{made}. Not: prompt encoding; loading; mp4"


def rollout_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows of whole videos as lines of text, and what their frames per second include."""
    lines = [
        f"{'method':16}{'size':>10}{'made':>9}{'decoded':>9}  frames/s{'first':>9}{'last/2nd':>10}"
        f"{'allocated':>11}{'reserved':>10}"
    ]
    whole = [row for row in rows if row["chunk"] == "all"]
    for row in whole:
        size = f"{row['width']}x{row['height']}"
        lines.append(
            f"{row['method']:16}{size:>10}{row['frames_per_second']:>9.1f}"
            f"{_cell(row.get('frames_per_second_decoded'), '.1f', ''):>9}          "
            f"{_cell(row.get('first_frames_ms'), '.0f', ' ms'):>9}"
            f"{_cell(row['last_over_second_chunk'], '.2f', ''):>10}"
            f"{_cell(row['peak_allocated_gib'], '.2f', ' GiB'):>11}"
            f"{_cell(row['peak_reserved_gib'], '.2f', ' GiB'):>10}"
        )
    return [*lines, *dict.fromkeys(f"includes: {row['includes']}" for row in whole)]


def _cell(value: float | None, form: str, unit: str) -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
