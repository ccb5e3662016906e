"""How sparse each chunk is: Chunk-Aware Growth and its alternatives. Plain numbers, no tensor.

A schedule answers one question: the sparsity of a chunk of a `Timeline`. It keeps no state, so
another one may take over at any chunk, and it has an answer for every chunk, planned or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

from .errors import UserError
from .layout import chunk_lengths

MAX_SPARSITY = 0.999
"""More than this would leave no block of a thousand; every schedule stops here."""


def _check_sparsity(name: str, value: float) -> None:
    if not 0 <= value <= MAX_SPARSITY:  # NaN fails too
        raise UserError(
            f"the {name} is the share of attention to skip and must be within 0 and "
            f"{MAX_SPARSITY}, got {value}"
        )


def _clamp(sparsity: float) -> float:
    return min(max(sparsity, 0.0), MAX_SPARSITY)


@dataclass(frozen=True)
class Timeline:
    """Chunks of a video as planned. Frames are latent frames.

    Past the last planned chunk it goes on with chunks as long as the longest planned one, so a
    video may be longer than its plan, or endless.

    Attributes:
        chunk_frames: frames of each planned chunk to generate.
        given_frames: frames the video starts from, made by no chunk.
        window_frames: frames attention sees, the chunk's own included; -1 for all.
    """

    chunk_frames: tuple[int, ...]
    given_frames: int = 0
    window_frames: int = -1
    # A plan may have a hundred thousand chunks, and each of them asks.
    _ends: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _betas: dict[tuple[float, float], float] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        ends = accumulate(self.chunk_frames, initial=self.given_frames)
        object.__setattr__(self, "_ends", tuple(ends)[1:])
        if not self.chunk_frames or min(self.chunk_frames) < 1 or self.given_frames < 0:
            raise UserError(
                "a timeline needs at least one chunk of at least 1 latent frame and no negative "
                f"count of given frames, got {self.chunk_frames} and {self.given_frames}"
            )
        if self.window_frames != -1 and self.window_frames < 1:
            raise UserError(
                "window frames must be -1 (whole history) or at least 1 latent frame, got "
                f"{self.window_frames}"
            )

    @property
    def num_chunks(self) -> int:
        """Planned chunks."""
        return len(self.chunk_frames)

    def frames(self, chunk: int) -> int:
        """Frames of a chunk, planned or not."""
        return self.chunk_frames[chunk] if chunk < self.num_chunks else max(self.chunk_frames)

    def end_frame(self, chunk: int) -> int:
        """Frames of the video up to and including a chunk, given ones counted."""
        if chunk < self.num_chunks:
            return self._ends[chunk]
        return self._ends[-1] + (chunk + 1 - self.num_chunks) * max(self.chunk_frames)

    def visible_frames(self, chunk: int) -> int:
        """Frames that a chunk's attention sees, its own included."""
        end = self.end_frame(chunk)
        return end if self.window_frames == -1 else min(end, self.window_frames)

    def is_anchor(self, chunk: int) -> bool:
        """Whether a chunk is dense under every schedule: less video precedes it than it has itself.

        That is the first chunk, on which all others build, and the chunk after a single first
        frame (given or made), which holds too little to build on. A chunk that continues a longer
        given video is no anchor: there the given frames are.
        """
        own = self.frames(chunk)
        return self.end_frame(chunk) - own < own


class GrowthSchedule(Protocol):
    """Sparsity by chunk.

    `kind` is the schedule's name in settings files. `sparsity` is asked for chunks that are not
    anchors only, and answers within 0..MAX_SPARSITY for every chunk index from 0 on.
    """

    @property
    def kind(self) -> str: ...

    def sparsity(self, chunk: int, timeline: Timeline) -> float: ...


@dataclass(frozen=True)
class ChunkAwareGrowth:
    """Light Forcing's schedule: s_i = base - beta / sqrt(F_i), F_i the frames up to chunk i.

    beta makes the attention of the planned chunks after the anchors cost what a uniform sparsity
    of `target` would: sum_i (1 - s_i) q_i L_i = (1 - target) sum_i q_i L_i, with q_i the chunk's
    frames and L_i the frames it sees.

    Past the last planned chunk the formula goes on with the same beta: F_i grows, so s_i rises on
    towards `base` and never passes it. What came before is not changed by going on.

    Deviations from the released code, none of which acts at its own settings: chunks may differ
    in length; where the formula is below 0 the sparsity is 0, and beta makes up for it in the
    other chunks, so that the mean stays the target (a target of 0 is dense throughout).

    Reference: Light Forcing (arXiv 2602.04789), Chunk-Aware Growth, and its `sparse_attention.py`.
    """

    target: float = 0.88
    base: float = 0.98
    kind: str = field(default="chunk_aware", init=False)

    def __post_init__(self) -> None:
        _check_sparsity("target sparsity", self.target)
        _check_sparsity("base sparsity", self.base)
        if self.base < self.target:
            raise UserError(
                "the base sparsity is the limit that chunks grow towards and must not be below "
                f"the target {self.target}, got {self.base}; raise the base or lower the target"
            )

    def sparsity(self, chunk: int, timeline: Timeline) -> float:
        if self.target == 0:
            return 0.0
        return _clamp(self.base - self.beta(timeline) / math.sqrt(timeline.end_frame(chunk)))

    def beta(self, timeline: Timeline) -> float:
        """Strength of the growth, in square roots of frames."""
        known = timeline._betas
        key = (self.target, self.base)
        if key not in known:
            known[key] = _beta(self.target, self.base, timeline)
        return known[key]


def _beta(target: float, base: float, timeline: Timeline) -> float:
    planned = [i for i in range(timeline.num_chunks) if not timeline.is_anchor(i)]
    # A plan of anchors alone says nothing about beta; then the first chunk past it decides.
    chunk = timeline.num_chunks
    while not planned:
        planned = [] if timeline.is_anchor(chunk) else [chunk]
        chunk += 1
    alpha = {i: 1 / math.sqrt(timeline.end_frame(i)) for i in planned}
    costs = {i: timeline.frames(i) * timeline.visible_frames(i) for i in planned}
    skipped = target * sum(costs.values())
    growing = planned
    while True:
        weighted = sum(alpha[i] * costs[i] for i in growing)
        beta = (base * sum(costs[i] for i in growing) - skipped) / weighted
        # The earliest chunks sink below 0 first, and leaving them there raises beta for the rest.
        above = [i for i in growing if base - alpha[i] * beta >= 0]
        if len(above) == len(growing) or not above:
            return beta
        growing = above


@dataclass(frozen=True)
class UniformSparsity:
    """The same sparsity for every chunk after the anchors."""

    value: float = 0.88
    kind: str = field(default="uniform", init=False)

    def __post_init__(self) -> None:
        _check_sparsity("sparsity", self.value)

    def sparsity(self, chunk: int, timeline: Timeline) -> float:
        return self.value


@dataclass(frozen=True)
class LinearRamp:
    """From `first` at the first chunk that is no anchor to `last` at the last planned one.

    Past the plan the last value holds.
    """

    first: float = 0.80
    last: float = 0.92
    kind: str = field(default="linear", init=False)

    def __post_init__(self) -> None:
        _check_sparsity("first sparsity of the ramp", self.first)
        _check_sparsity("last sparsity of the ramp", self.last)

    def sparsity(self, chunk: int, timeline: Timeline) -> float:
        start = next((i for i in range(chunk) if not timeline.is_anchor(i)), chunk)
        end = timeline.num_chunks - 1
        if chunk >= end:
            return self.last
        return self.first + (self.last - self.first) * (chunk - start) / (end - start)


@dataclass(frozen=True)
class HandDrawn:
    """A value for each chunk from the first on; the last one holds from there on.

    Anchors stay dense whatever is drawn for them, so the list `schedule` prints can be given
    back.
    """

    values: tuple[float, ...]
    kind: str = field(default="hand_drawn", init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        if not self.values:
            raise UserError("a hand-drawn schedule needs at least one sparsity, got an empty list")
        for chunk, value in enumerate(self.values):
            _check_sparsity(f"sparsity drawn for chunk {chunk + 1}", value)

    def sparsity(self, chunk: int, timeline: Timeline) -> float:
        return self.values[min(chunk, len(self.values) - 1)]


PRESETS: dict[str, ChunkAwareGrowth] = {
    "short": ChunkAwareGrowth(0.88, 0.98),  # 5 s, whole history
    "long": ChunkAwareGrowth(0.85, 0.95),  # 15 s and more, a window of 12 latent frames
    # What the authors advise on Hopper: their blocks of 128 gain nothing from more.
    "hopper": ChunkAwareGrowth(0.80, 0.90),
}


def default_base(target: float) -> float:
    """Base sparsity that goes with a target: 0.10 above it, as in every released setting."""
    return min(target + 0.10, 0.99)


def chunk_sparsity(schedule: GrowthSchedule, timeline: Timeline, chunk: int) -> float:
    """Sparsity of one chunk, 0..MAX_SPARSITY; 0 for anchors.

    Args: chunk from 0, planned or not.
    """
    return 0.0 if timeline.is_anchor(chunk) else _clamp(schedule.sparsity(chunk, timeline))


def kept_blocks(sparsity: float, key_blocks: int) -> int:
    """Key blocks that each query block keeps: floor((1 - s) x all key blocks), at least 1.

    The released code keeps 0 where the product is below 1, which attends to nothing.
    """
    return max(math.floor((1 - sparsity) * key_blocks), 1)


def schedule_report(
    schedule: GrowthSchedule,
    *,
    frames: int,
    frames_per_chunk: int,
    window_frames: int = -1,
    given_frames: int = 0,
    frame_tokens: int = 1536,
    block_tokens: int = 64,
) -> dict[str, Any]:
    """What a schedule does to a video, ready for JSON.

    Args:
        frames, frames_per_chunk, window_frames, given_frames: latent frames.
        frame_tokens: tokens of a latent frame (1536 at 768x512).
        block_tokens: tokens of a key block; blocks do not straddle frames.

    Returns:
        Lists with an entry per chunk: `sparsities` (unrounded, 0.0 for anchors), `kept_blocks`
        and `key_blocks` (per query block), `chunk_frames`, `visible_frames`; and
        `density` (kept / all pairs of the whole video), `density_after_anchors` (of the chunks
        that are not dense by rule), `schedule` and the arguments.

    Raises:
        UserError: sizes below 1.
    """
    if frame_tokens < 1 or block_tokens < 1:
        raise UserError(
            "tokens of a frame and of a block must be at least 1, "
            f"got {frame_tokens} and {block_tokens}"
        )
    lengths = chunk_lengths(frames, frames_per_chunk)
    timeline = Timeline(tuple(lengths), given_frames, window_frames)
    blocks_per_frame = -(-frame_tokens // block_tokens)
    chunks = range(timeline.num_chunks)
    visible = [timeline.visible_frames(i) for i in chunks]
    sparsities = [chunk_sparsity(schedule, timeline, i) for i in chunks]
    key_blocks = [blocks_per_frame * n for n in visible]
    kept = [kept_blocks(s, n) for s, n in zip(sparsities, key_blocks, strict=True)]
    sparse = [i for i in chunks if not timeline.is_anchor(i)]
    return {
        "schedule": schedule.kind,
        "frames": frames,
        "frames_per_chunk": frames_per_chunk,
        "window_frames": window_frames,
        "given_frames": given_frames,
        "frame_tokens": frame_tokens,
        "block_tokens": block_tokens,
        "chunk_frames": lengths,
        "visible_frames": visible,
        "sparsities": sparsities,
        "kept_blocks": kept,
        "key_blocks": key_blocks,
        "density": _density(lengths, kept, key_blocks, chunks),
        "density_after_anchors": _density(lengths, kept, key_blocks, sparse),
    }


def _density(
    lengths: Sequence[int], kept: Sequence[int], key_blocks: Sequence[int], chunks: Sequence[int]
) -> float:
    """Kept pairs over all pairs of some chunks; 1 when there are none."""
    total = sum(lengths[i] * key_blocks[i] for i in chunks)
    return sum(lengths[i] * kept[i] for i in chunks) / total if total else 1.0
