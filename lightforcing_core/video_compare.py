"""Two videos as one, to be compared by eye: side by side, or behind a line that moves."""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw

from .errors import UserError
from .palette import INK, PAPER, font

Layout = Literal["side_by_side", "slider"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

_GAP_PIXELS = 4  # between the two; even, as a video's width has to be
_SWEEP_FRAMES = 96  # the line's way there and back, 6 s at 16 frames a second
_LINE_PIXELS = 2
_MARGIN_PIXELS = 6


class VideoComparison:
    """Puts the frames of two videos of one size into frames of one video, as they come.

    Args:
        layout: 'side_by_side', or 'slider': both in the same place, the left one to the left of a
            line that goes from side to side.
        left_label, right_label: written into the upper corners; empty for none.

    Raises:
        UserError: no such layout.
    """

    def __init__(self, layout: str, left_label: str = "", right_label: str = "") -> None:
        if layout not in LAYOUTS:
            raise UserError(f"no layout '{layout}'; choose one of {', '.join(LAYOUTS)}")
        self._layout = layout
        self._labels = (left_label, right_label)
        self._frames = 0

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the comparison of videos of this size, pixels."""
        return (width if self._layout == "slider" else 2 * width + _GAP_PIXELS), height

    def compose(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """The next frames of both.

        Args: left, right: uint8 [t, H, W, 3].
        Returns: uint8 [t, H, W', 3] with W' as `size` says.
        Raises:
            ValueError: the two differ in shape, or are no frames.
        """
        if left.shape != right.shape or left.ndim != 4 or left.shape[-1] != 3:
            raise ValueError(
                "frames to compare must both be [t, H, W, 3], got "
                f"{list(left.shape)} and {list(right.shape)}"
            )
        height, width = left.shape[1:3]
        scale = max(height // 240, 1)
        tags = [_tag(text, 12 * scale, width) if text else None for text in self._labels]
        left, right = left.copy(), right.copy()
        _stamp(left, tags[0], at_left=True)
        _stamp(right, tags[1], at_left=False)
        if self._layout == "side_by_side":
            gap = np.full((left.shape[0], height, _GAP_PIXELS, 3), 255, np.uint8)
            frames = np.concatenate([left, gap, right], axis=2)
        else:
            frames = right
            for index in range(frames.shape[0]):
                edge = _edge(self._frames + index, width)
                frames[index, :, :edge] = left[index, :, :edge]
                frames[index, :, max(edge - _LINE_PIXELS, 0) : edge] = 255
        self._frames += frames.shape[0]
        return frames


def _edge(frame: int, width: int) -> int:
    """Where the line stands in a frame, pixels from the left; it starts in the middle."""
    swing = math.sin(2 * math.pi * frame / _SWEEP_FRAMES)
    return round(width * (0.5 + 0.45 * swing))


def _tag(text: str, pixels: int, width: int) -> np.ndarray:
    """A label, uint8 [h, w, 3], no wider than so many pixels."""
    letters = font(pixels)
    left, top, right, bottom = letters.getbbox(text)
    size = (math.ceil(right - left) + pixels, math.ceil(bottom - top) + pixels)
    picture = Image.new("RGB", size, INK)
    ImageDraw.Draw(picture).text(
        (pixels / 2 - left, pixels / 2 - top), text, PAPER, letters, anchor="la"
    )
    return np.asarray(picture)[:, : width - 2 * _MARGIN_PIXELS]


def _stamp(frames: np.ndarray, tag: np.ndarray | None, *, at_left: bool) -> None:
    """Write a label into an upper corner of every frame, as far as it fits."""
    if tag is None:
        return
    height, width = frames.shape[1:3]
    tag = tag[: max(height - _MARGIN_PIXELS, 0)]
    left = _MARGIN_PIXELS if at_left else width - _MARGIN_PIXELS - tag.shape[1]
    if left < 0 or not tag.size:
        return
    rows = slice(_MARGIN_PIXELS, _MARGIN_PIXELS + tag.shape[0])
    columns = slice(left, left + tag.shape[1])
    # A third of the picture shows through.
    frames[:, rows, columns] = (frames[:, rows, columns] // 3) + (tag // 3) * 2
