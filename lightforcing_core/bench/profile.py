"""`lightforcing bench rollout --profile`: where the time of one video goes, chunk by chunk.

The profiler lists every kernel with its start and end. Which chunk and pass it belongs to is told
by tiny kernels between the passes (`Timeline.mark`), in stream order, so the host never waits. At
every moment the device does one thing: what runs on the stream of the forwards; else decoding on
another stream; else a copy; else nothing. So the parts of a chunk sum to its time, and decoding
counts only where nothing hides it; all of its kernels' time is listed beside.

Profiling costs time itself, most of all between kernels: compare with the unprofiled time.
"""

from __future__ import annotations

import re
import statistics
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ..errors import UserError
from ..sparse_settings import SparseSettings
from .case import RolloutCase
from .common import device_name, machine_facts
from .kernel_parts import CLEAN, COPY, DECODE, IDLE, PARTS, part_of
from .rollout import METHODS, timed
from .video import Video

_MARK = "lightforcing mark"
_MARK_KERNEL = "spin_kernel"  # of torch.cuda._sleep, which nothing else launches
# Listed among kernels, but only waiting, or a name for those below it.
_NO_WORK = re.compile(r"(context|event|stream) (sync|wait)|## ", re.IGNORECASE)
_KERNELS_LISTED = 40


@dataclass(frozen=True)
class Event:
    """A kernel, copy or operator: seconds on one clock, and the stream it ran on."""

    name: str
    start: float
    end: float
    stream: int


@dataclass(frozen=True)
class Region:
    """From one mark on: what the host asked for, of which chunk, since when."""

    label: str
    chunk: int
    start: float


@dataclass(frozen=True)
class ChunkParts:
    """Seconds of one chunk by part; they sum to `wall`.

    Attributes:
        decode_beside: of all kernels that decode on another stream, hidden or not.
        launches: kernels, copies and clears (operators on the CPU).
    """

    chunk: int
    wall: float
    parts: dict[str, float]
    decode_beside: float
    launches: int


@dataclass(frozen=True)
class KernelTime:
    """All launches of one name in one part."""

    name: str
    part: str
    seconds: float
    launches: int


@dataclass(frozen=True)
class Profile:
    """Where the time of a video went."""

    chunks: list[ChunkParts]
    kernels: list[KernelTime]

    @property
    def wall(self) -> float:
        """Seconds from the first mark to the last."""
        return sum(chunk.wall for chunk in self.chunks)

    def rows(self) -> list[dict[str, Any]]:
        """One for each chunk, milliseconds, and one with chunk 'all'."""
        rows = [_row(chunk.chunk, [chunk]) for chunk in self.chunks]
        return [*rows, _row("all", self.chunks)]


def _row(name: int | str, chunks: Sequence[ChunkParts]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "chunk": name,
        "wall_ms": round(sum(chunk.wall for chunk in chunks) * 1e3, 3),
    }
    for part in PARTS:
        key = f"{part.replace(' ', '_')}_ms"
        row[key] = round(sum(chunk.parts[part] for chunk in chunks) * 1e3, 3)
    row["decode_beside_ms"] = round(sum(c.decode_beside for c in chunks) * 1e3, 3)
    return row | {"launches": sum(chunk.launches for chunk in chunks)}


class ProfileError(UserError):
    """The profiler gave nothing that can be used."""


class Timeline:
    """Records what a device does while it is entered. The last mark ends what is counted."""

    def __init__(self, device: torch.device, *, beside: str = DECODE) -> None:
        """Args: beside: the part of kernels on other streams than that of the marks."""
        self._beside = beside
        self._is_cuda = device.type == "cuda"
        kinds = ProfilerActivity.CUDA if self._is_cuda else ProfilerActivity.CPU
        self._profiler = profile(activities=[kinds])
        self._labels: list[tuple[str, int]] = []

    def __enter__(self) -> Timeline:
        self._profiler.__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._profiler.__exit__(*exc_info)

    def mark(self, label: str, chunk: int) -> None:
        """What the present stream is given from here on, and for which chunk."""
        self._labels.append((label, chunk))
        if self._is_cuda:
            torch.cuda._sleep(1)
        else:
            with record_function(_MARK):
                pass

    def result(self) -> Profile:
        """When it has been left.

        Raises:
            ProfileError: the profiler lost marks, so that nothing can be told apart.
        """
        kind = torch.autograd.DeviceType.CUDA if self._is_cuda else torch.autograd.DeviceType.CPU
        events: list[Event] = []
        marks: list[Event] = []
        for given in self._profiler.events():
            if given.device_type != kind or (self._is_cuda and _NO_WORK.match(given.name)):
                continue
            span = given.time_range.start / 1e6, given.time_range.end / 1e6
            stream = given.device_resource_id if self._is_cuda else given.thread
            event = Event(given.name, *span, stream)
            is_mark = _MARK_KERNEL in event.name if self._is_cuda else event.name == _MARK
            (marks if is_mark else events).append(event)
        if len(marks) != len(self._labels):
            raise ProfileError(
                f"the profiler kept {len(marks)} of {len(self._labels)} marks between passes; it "
                "may not be allowed to watch this device, another profiler may be running, or its "
                "buffer was full: end other profilers, or make a shorter video"
            )
        marks.sort(key=lambda mark: mark.start)
        regions = [
            Region(*label, mark.start) for label, mark in zip(self._labels, marks, strict=True)
        ]
        main = marks[0].stream
        if not self._is_cuda:
            events = outermost(event for event in events if event.stream == main)
        return split_by_part(events, regions, main, is_cuda=self._is_cuda, beside=self._beside)


def outermost(events: Iterable[Event]) -> list[Event]:
    """Operators that no other one called."""
    kept: list[Event] = []
    for event in sorted(events, key=lambda event: (event.start, -event.end)):
        if not kept or event.start >= kept[-1].end:
            kept.append(event)
    return kept


def split_by_part(
    events: Sequence[Event],
    regions: Sequence[Region],
    main: int,
    *,
    is_cuda: bool,
    beside: str = DECODE,
) -> Profile:
    """Give every moment of every chunk to one part.

    Args:
        regions: in order of time; the last one only ends what is counted.
        main: the stream of the forwards.
        beside: the part of kernels on other streams.
    """
    starts = [region.start for region in regions]
    begin, end = starts[0], starts[-1]
    times: dict[int, dict[str, float]] = {
        region.chunk: dict.fromkeys(PARTS, 0.0) for region in regions
    }
    decoding: Counter[int] = Counter()
    launches: Counter[int] = Counter()
    by_name: dict[tuple[str, str], list[float]] = defaultdict(list)
    # (time, begins or ends, rank, part); rank: main stream, other streams, copies
    steps: list[tuple[float, int, int, str]] = []
    for event in events:
        start, stop = max(event.start, begin), min(event.end, end)
        if start >= stop:
            continue
        region = regions[bisect_right(starts, start) - 1]
        part, rank = _place(event, region, main, beside, is_cuda=is_cuda)
        steps += [(start, 1, rank, part), (stop, -1, rank, part)]
        launches[region.chunk] += 1
        by_name[event.name, part].append(event.end - event.start)
        if event.stream != main and part == DECODE:
            decoding[region.chunk] += stop - start
    # Only to cut at the borders of chunks.
    steps += [(start, 0, 0, IDLE) for start in starts]
    steps.sort(key=lambda step: step[0])

    running: Counter[tuple[int, str]] = Counter()
    place = begin
    for time, change, rank, part in steps:
        if time > place:
            chunk = regions[bisect_right(starts, place) - 1].chunk
            busy = [key for key, count in running.items() if count]
            times[chunk][min(busy)[1] if busy else IDLE] += time - place
            place = time
        running[rank, part] += change
    kernels = [KernelTime(*key, sum(spent), len(spent)) for key, spent in by_name.items()]
    return Profile(
        [
            ChunkParts(chunk, sum(parts.values()), parts, decoding[chunk], launches[chunk])
            for chunk, parts in sorted(times.items())
        ],
        sorted(kernels, key=lambda kernel: -kernel.seconds),
    )


def _place(
    event: Event, region: Region, main: int, beside: str, *, is_cuda: bool
) -> tuple[str, int]:
    """The part of an event, and its rank among those at the same moment."""
    part = part_of(event.name, is_cuda=is_cuda)
    if part == COPY:
        return COPY, 2
    if event.stream != main:
        return beside, 1
    by_region = {"clean": CLEAN, "decode": DECODE}
    return by_region.get(region.label, part), 0


def profile_rollout(
    case: RolloutCase,
    device: torch.device,
    sparse: SparseSettings,
    method: str,
    repeats: int = 3,
) -> dict[str, Any]:
    """Profile one video of a method of `bench.rollout.METHODS`.

    Returns:
        `rows` (milliseconds by part of every chunk and of 'all', which also has the median time of
        videos that were not profiled), `kernels` (names with their part, the longest first),
        `method`, `device`, `versions`.
    """
    video = Video(case, METHODS[method], sparse, device)
    try:
        unprofiled = [run.seconds for run in timed(video, repeats)]
        found = profiled(video, device)
    finally:
        video.release()
    facts = {"method": method, "width": case.size.width, "height": case.size.height}
    rows = [{**facts, **row} for row in found.rows()]
    rows[-1] |= {
        "unprofiled_ms": round(statistics.median(unprofiled) * 1e3, 3),
        "unprofiled_ms_min": round(min(unprofiled) * 1e3, 3),
        "unprofiled_ms_max": round(max(unprofiled) * 1e3, 3),
        "frames": case.frames,
        "decoder": case.decoder,
    }
    return {
        "device": device_name(device),
        "versions": machine_facts(device),
        "method": method,
        "rows": rows,
        "kernels": kernel_rows(found),
    }


def profiled(make: Callable[[Callable[[str, int], None]], object], device: torch.device) -> Profile:
    """The profile of what `make` does, which marks its passes and its end."""
    timeline = Timeline(device)
    with timeline:
        make(timeline.mark)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return timeline.result()


def profile_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows of `Profile.rows` as lines of text, milliseconds; parts that no row has are left out."""
    keys = {part: f"{part.replace(' ', '_')}_ms" for part in PARTS}
    shown = {part: key for part, key in keys.items() if key in rows[-1]}
    lines = [f"{'chunk':>5}{'ms':>10}" + "".join(f"{part:>12}" for part in shown)]
    for row in rows:
        name = row["chunk"] if row["chunk"] == "all" else row["chunk"] + 1
        spent = "".join(f"{row[key]:>12.2f}" for key in shown.values())
        lines.append(f"{name:>5}{row['wall_ms']:>10.2f}{spent}")
    whole = rows[-1]
    shares = (100 * whole[key] / max(whole["wall_ms"], 1e-9) for key in shown.values())
    lines.append(f"{'share':>5}{'':>10}" + "".join(f"{share:>10.1f} %" for share in shares))
    if whole["decode_beside_ms"]:
        lines.append(
            f"decoding on its own stream: {whole['decode_beside_ms']:.1f} ms of kernels, "
            "of which the column counts what nothing hides"
        )
    if "unprofiled_ms" in whole:
        lines.append(
            f"the same video unprofiled: {whole['unprofiled_ms']:.1f} ms "
            f"({whole['unprofiled_ms_min']:.1f} to {whole['unprofiled_ms_max']:.1f})"
        )
    return lines


def kernel_rows(found: Profile) -> list[dict[str, Any]]:
    """The longest kernels, so that a wrong part can be seen and told."""
    return [
        {
            "name": kernel.name[:200],
            "part": kernel.part,
            "ms": round(kernel.seconds * 1e3, 3),
            "launches": kernel.launches,
        }
        for kernel in found.kernels[:_KERNELS_LISTED]
    ]
