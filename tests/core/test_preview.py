"""Strips hold every frame in its order, small enough to send."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from lightforcing.lightforcing_core.preview import frame_strips


@pytest.mark.parametrize(
    ("frames", "height", "width", "small"),
    [(9, 128, 256, (256, 128)), (40, 480, 832, (512, 295)), (1, 1024, 16, (8, 512))],
)
def test_frames_lie_one_below_another(
    frames: int, height: int, width: int, small: tuple[int, int]
) -> None:
    levels = np.linspace(0, 250, frames).astype(np.uint8)
    video = np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3))
    strips = frame_strips(video)
    assert sum(strip.frames for strip in strips) == frames
    shown: list[float] = []
    for strip in strips:
        assert (strip.width, strip.height) == small
        pixels = np.asarray(Image.open(io.BytesIO(strip.jpeg)))
        assert pixels.shape == (strip.frames * strip.height, strip.width, 3)
        shown += pixels.reshape(strip.frames, -1).mean(axis=1).tolist()
    np.testing.assert_allclose(shown, levels, atol=4)
