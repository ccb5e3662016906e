"""How a video is made: lengths, steps, window, sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import UserError
from .layout import chunk_lengths
from .schedule import Timeline
from .sparse_settings import SparseSettings
from .timesteps import SELF_FORCING_STEPS, TRAIN_TIMESTEPS, check_steps


@dataclass(frozen=True)
class RolloutSettings:
    """How a video is made. Frames are latent frames throughout.

    Attributes:
        num_frames: frames to generate, given frames not counted.
        frames_per_chunk: frames denoised together; the last chunk may be shorter.
        steps: timesteps of the denoising forwards, falling, 1000 = pure noise.
        first_chunk_steps: another list for the first chunk (Causal Forcing++ 1- and 2-step
            models take 4 steps there); None for the same.
        independent_first_frame: the first chunk is one frame; ignored when frames are given.
        window_frames: frames attention sees, sinks and the current chunk included;
            -1 for the whole history.
        sink_frames: first frames of the video that stay visible in a window.
        context_timestep: timestep of the clean pass (0 in every published model).
        sparse: how self-attention is made sparse; None: dense.
    """

    num_frames: int
    frames_per_chunk: int = 3
    steps: Sequence[float] = SELF_FORCING_STEPS
    first_chunk_steps: Sequence[float] | None = None
    independent_first_frame: bool = False
    window_frames: int = -1
    sink_frames: int = 0
    context_timestep: float = 0.0
    sparse: SparseSettings | None = None

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if self.first_chunk_steps is not None:
            check_steps(self.first_chunk_steps)
        if self.frames_per_chunk < 1 or self.num_frames < 1:
            raise UserError(
                "the number of frames and of frames per chunk (latent frames) must be at least 1, "
                f"got {self.num_frames} and {self.frames_per_chunk}"
            )
        if not 0 <= self.context_timestep < TRAIN_TIMESTEPS:
            raise UserError(
                f"the clean pass's timestep must be in [0, 1000), got {self.context_timestep}"
            )
        if self.window_frames != -1 and self.window_frames < 1:
            raise UserError(
                "window frames must be -1 (whole history) or at least 1 latent frame, got "
                f"{self.window_frames}"
            )
        if not 0 <= self.sink_frames < max(self.window_frames, 1) and self.window_frames != -1:
            raise UserError(
                f"sink frames must be fewer than the {self.window_frames} latent frames of the "
                f"window, got {self.sink_frames}; lower the sink or raise the window"
            )
        if self.sink_frames and self.window_frames == -1:
            raise UserError(
                f"{self.sink_frames} sink frames have no meaning without a window; "
                "set window frames too"
            )

    def chunk_lengths(self, given_frames: int = 0) -> list[int]:
        """Frames of each chunk to generate."""
        return chunk_lengths(
            self.num_frames,
            self.frames_per_chunk,
            independent_first_frame=self.independent_first_frame and not given_frames,
        )

    def chunk_steps(self, given_frames: int = 0) -> list[int]:
        """Denoising steps of each chunk to generate."""
        steps = [len(self.steps)] * len(self.chunk_lengths(given_frames))
        if self.first_chunk_steps is not None:
            steps[0] = len(self.first_chunk_steps)
        return steps

    def capacity_frames(self, given_frames: int = 0) -> int:
        """Frames the key/value cache must hold."""
        total = given_frames + self.num_frames
        return total if self.window_frames == -1 else min(self.window_frames, total)

    def timeline(self, given_frames: int = 0) -> Timeline:
        """The chunks as a growth schedule sees them."""
        lengths = tuple(self.chunk_lengths(given_frames))
        return Timeline(lengths, given_frames, self.window_frames)
