"""Small pictures of frames just made, for whoever watches: JPEG strips, a frame below the other."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

_LARGEST_SIDE = 512  # pixels of a previewed frame
_FRAMES_PER_STRIP = 16  # browsers refuse pictures of tens of thousands of pixels
_QUALITY = 82


@dataclass(frozen=True)
class FrameStrip:
    """Frames one below another in one JPEG file, each `width` x `height` pixels."""

    jpeg: bytes
    frames: int
    width: int
    height: int


def frame_strips(frames: np.ndarray) -> list[FrameStrip]:
    """Frames, made smaller where they are large, as strips in their order.

    Args: frames: uint8 [t, H, W, 3].
    """
    height, width = frames.shape[1:3]
    scale = min(1.0, _LARGEST_SIDE / max(height, width))
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    strips = []
    for start in range(0, frames.shape[0], _FRAMES_PER_STRIP):
        part = frames[start : start + _FRAMES_PER_STRIP]
        # Each frame on its own: resizing the strip would mix neighbours at their borders.
        small = [Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR) for frame in part]
        strip = Image.fromarray(np.concatenate([np.asarray(picture) for picture in small]))
        file = io.BytesIO()
        strip.save(file, "JPEG", quality=_QUALITY)
        strips.append(FrameStrip(file.getvalue(), len(part), *size))
    return strips
