"""A comparison shows each video where it says, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.video_compare import VideoComparison


def _videos(frames: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.random.default_rng(0).integers(0, 250, (2, frames, height, width, 3))
    return tuple(pixels.astype(np.uint8))


def test_side_by_side_keeps_every_pixel() -> None:
    left, right = _videos(3, 20, 32)
    comparison = VideoComparison("side_by_side")
    frames = comparison.compose(left, right)
    assert frames.shape == (3, 20, 68, 3) and comparison.size(32, 20) == (68, 20)
    np.testing.assert_array_equal(frames[:, :, :32], left)
    np.testing.assert_array_equal(frames[:, :, 36:], right)


def test_the_slider_visits_both_sides_and_goes_on_from_chunk_to_chunk() -> None:
    left, right = _videos(96, 8, 100)
    whole = VideoComparison("slider").compose(left, right)
    parts = VideoComparison("slider")
    chunks = [parts.compose(left[i : i + 12], right[i : i + 12]) for i in range(0, 96, 12)]
    np.testing.assert_array_equal(np.concatenate(chunks), whole)
    of_left = (whole == left).all(axis=(1, 3)).sum(axis=1)  # columns that show the left video
    assert of_left.min() <= 6 and of_left.max() >= 92
    line = (whole == 255).all(axis=(1, 3)).sum(axis=1)
    assert set(line.tolist()) == {2}


def test_a_label_lies_in_its_corner_and_leaves_the_inputs_alone() -> None:
    left, right = _videos(1, 60, 120)
    before = left.copy()
    frames = VideoComparison("side_by_side", "dense", "sparse").compose(left, right)
    np.testing.assert_array_equal(left, before)
    changed = (frames[0, :, :120] != left[0]).any(axis=-1)
    assert changed[:30, :60].any() and not changed[40:].any() and not changed[:, 80:].any()


@pytest.mark.parametrize(("height", "width"), [(4, 4), (16, 16), (8, 200)])
def test_a_label_that_does_not_fit_is_no_error(height: int, width: int) -> None:
    left, right = _videos(1, height, width)
    VideoComparison("slider", "a long label", "another long label").compose(left, right)


def test_what_cannot_be_compared_is_refused() -> None:
    left, right = _videos(1, 8, 8)
    with pytest.raises(UserError, match="no layout 'above'"):
        VideoComparison("above")
    with pytest.raises(ValueError, match="both be"):
        VideoComparison("slider").compose(left, right[:, :4])
