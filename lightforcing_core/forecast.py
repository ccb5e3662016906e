"""What sparse settings will do to a video, before it is made. Plain numbers, no tensor."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from .errors import UserError
from .schedule import Timeline
from .selection import KeyView
from .sparse_settings import SparseSettings


@dataclass(frozen=True)
class ChunkForecast:
    """One chunk to come.

    Attributes:
        sparsity: asked for, 0..1.
        density: share of (query block, key block) pairs that will be computed, 0..1, mean over
            layers and denoising steps, as `ChunkStatistics.density`.
        frames: latent frames of the chunk.
        visible_frames: latent frames it sees, its own included.
    """

    index: int
    sparsity: float
    density: float
    frames: int
    visible_frames: int


@dataclass(frozen=True)
class Forecast:
    """The chunks of a video to come."""

    chunks: tuple[ChunkForecast, ...]

    @property
    def density(self) -> float:
        """Share of all pairs of the video that will be computed, 0..1."""
        pairs = [chunk.frames * chunk.visible_frames for chunk in self.chunks]
        kept = (n * chunk.density for n, chunk in zip(pairs, self.chunks, strict=True))
        return sum(kept) / sum(pairs)


def forecast(
    settings: SparseSettings | None,
    timeline: Timeline,
    *,
    frame_tokens: int,
    num_layers: int,
    num_steps: int,
) -> Forecast:
    """What a run of these settings will ask for and compute.

    Args:
        settings: None: dense.
        timeline: the chunks to come.
        frame_tokens: tokens of a latent frame.
        num_layers: of the model; matters where some of its layers are dense.
        num_steps: denoising steps of a chunk; matters where the first has a budget of its own.

    Raises:
        UserError: a count below 1.
    """
    counts = {"tokens of a frame": frame_tokens, "layers": num_layers, "steps": num_steps}
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"the number of {name} must be at least 1, got {value}")
    return Forecast(
        tuple(
            _chunk(settings, timeline, index, frame_tokens, num_layers, num_steps)
            for index in range(timeline.num_chunks)
        )
    )


def _chunk(
    settings: SparseSettings | None,
    timeline: Timeline,
    index: int,
    frame_tokens: int,
    num_layers: int,
    num_steps: int,
) -> ChunkForecast:
    frames, visible = timeline.frames(index), timeline.visible_frames(index)
    sparsity, density = 0.0, 1.0
    if settings is not None and frames < visible:
        end = timeline.end_frame(index)
        view = KeyView(
            slot_frames=tuple(range(end - visible, end)),
            own_slots=tuple(range(visible - frames, visible)),
            blocks_per_frame=-(-frame_tokens // settings.key_block(frame_tokens)),
        )
        sparsity = settings.sparsity(index, timeline, view.num_blocks)
        density = _density(settings, sparsity, view, num_layers, num_steps)
        if density == 1:
            sparsity = 0.0
    return ChunkForecast(index, sparsity, density, frames, visible)


def _density(
    settings: SparseSettings, sparsity: float, view: KeyView, num_layers: int, num_steps: int
) -> float:
    kept: dict[float, float] = {}
    shares = []
    for step in range(num_steps):
        for layer in range(num_layers):
            of_pass = settings.budgets.sparsity(sparsity, step, layer, num_layers)
            if of_pass not in kept:
                rule = settings.policy.rule(view, of_pass) if of_pass else None
                kept[of_pass] = 1.0 if rule is None else rule.top_k / view.num_blocks
            shares.append(kept[of_pass])
    return fmean(shares)
