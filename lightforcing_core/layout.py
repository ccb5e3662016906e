"""Frames, chunks and sizes as integers. Nothing here touches a tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import UserError

SPATIAL_COMPRESSION = 8  # pixels per latent value, both axes (Wan 2.1 VAE)
TEMPORAL_COMPRESSION = 4  # pixel frames per latent frame; the first latent frame is 1
PATCH = 2  # latent values per token, both axes
TOKEN_ORDERS = ("raster", "tiles")


def latent_frames(pixel_frames: int) -> int:
    """Latent frames of a video of 4 k + 1 pixel frames.

    Raises:
        UserError: another count.
    """
    if pixel_frames < 1 or (pixel_frames - 1) % TEMPORAL_COMPRESSION:
        below = max((pixel_frames - 1) // TEMPORAL_COMPRESSION, 0) * TEMPORAL_COMPRESSION + 1
        raise UserError(
            f"the number of frames must be 4k + 1 (1, 5, 9, ... 81), got {pixel_frames}; "
            f"use {below} or {below + TEMPORAL_COMPRESSION}"
        )
    return (pixel_frames - 1) // TEMPORAL_COMPRESSION + 1


@dataclass(frozen=True)
class FrameSize:
    """Picture size in pixels, and what follows from it."""

    width: int
    height: int

    def __post_init__(self) -> None:
        step = SPATIAL_COMPRESSION * PATCH
        if self.width < step or self.height < step or self.width % step or self.height % step:
            nearest = [max(round(v / step), 1) * step for v in (self.width, self.height)]
            raise UserError(
                f"width and height must be multiples of {step} pixels, got "
                f"{self.width}x{self.height}; the nearest is {nearest[0]}x{nearest[1]}"
            )

    @classmethod
    def parse(cls, text: str) -> FrameSize:
        """Read 'WIDTHxHEIGHT', in pixels."""
        width, _, height = text.lower().partition("x")
        if not all(v.isascii() and v.isdecimal() for v in (width, height)):
            raise UserError(f"size must look like 832x480 (width x height), got '{text}'")
        return cls(int(width), int(height))

    @property
    def latent_width(self) -> int:
        return self.width // SPATIAL_COMPRESSION

    @property
    def latent_height(self) -> int:
        return self.height // SPATIAL_COMPRESSION

    @property
    def frame_tokens(self) -> int:
        """Tokens of one latent frame."""
        return (self.latent_width // PATCH) * (self.latent_height // PATCH)


def chunk_lengths(
    num_frames: int, frames_per_chunk: int, *, independent_first_frame: bool = False
) -> list[int]:
    """Latent frames of each chunk; the last one may be shorter.

    Args:
        num_frames: latent frames to split, at least 1.
        frames_per_chunk: latent frames denoised together, at least 1.
        independent_first_frame: the first chunk is a single frame (Self Forcing's
            `independent_first_frame`).

    Raises:
        UserError: a count below 1.
    """
    for name, value in (("frames", num_frames), ("frames per chunk", frames_per_chunk)):
        if value < 1:
            raise UserError(f"the number of {name} (latent frames) must be at least 1, got {value}")
    lengths = [1] if independent_first_frame else []
    rest = num_frames - sum(lengths)
    lengths += [frames_per_chunk] * (rest // frames_per_chunk)
    if rest % frames_per_chunk:
        lengths.append(rest % frames_per_chunk)
    return lengths


def context_lengths(num_frames: int, frames_per_chunk: int) -> list[int]:
    """How given frames are fed to the cache: whole chunks, an odd remainder first.

    With one frame more than whole chunks this is Self Forcing's independent first frame.
    """
    remainder = num_frames % frames_per_chunk
    return ([remainder] if remainder else []) + [frames_per_chunk] * (
        num_frames // frames_per_chunk
    )


def tile_order(rows: int, columns: int, block_tokens: int) -> tuple[int, ...]:
    """An order of a frame's tokens in which every block of consecutive ones is compact.

    The frame is cut into bands about as high as a square block. In a band tokens go column by
    column, and every other band goes from right to left: a block that ends in the band below lies
    at one edge of the picture and not at both. 32 x 48 tokens in blocks of 64 give tiles of 8 x 8;
    30 x 52 give bands of 8, 8, 7 and 7 rows and blocks that need not end with a column.

    Args:
        rows, columns: tokens of a frame.
        block_tokens: of a key block.

    Returns:
        For each place in the order the raster index (row x columns + column) of its token. A
        picture of values in this order is `picture[list(order)] = values`.

    Raises:
        UserError: a count below 1.
    """
    for name, value in (("rows", rows), ("columns", columns), ("block tokens", block_tokens)):
        if value < 1:
            raise UserError(f"the number of {name} must be at least 1, got {value}")
    bands = max(round(rows / math.sqrt(block_tokens)), 1)
    order: list[int] = []
    for band in range(bands):
        # The first bands are a row higher where they cannot all be equal.
        first, end = (-(-rows * edge // bands) for edge in (band, band + 1))
        across = range(columns) if band % 2 == 0 else reversed(range(columns))
        order += [row * columns + column for column in across for row in range(first, end)]
    return tuple(order)
