"""The judge: right on true videos, wrong on false ones, and no better than chance on strangers."""

from __future__ import annotations

import pytest
import torch

from lightforcing.training.judge import METRICS, frame_changes, judge, shape_overlaps
from lightforcing.training.scenes import SHAPES, render, sample_attributes, shape_distances
from lightforcing.training.validate_judge import chance, wrong_attribute

CLIPS = 3


@pytest.fixture(scope="module")
def truth():
    generator = torch.Generator().manual_seed(21)
    scenes = sample_attributes(64, generator, held_out_first=True)
    scenes = scenes.select((scenes.count <= 2).nonzero()[:CLIPS, 0])
    return scenes, render(scenes)


def test_true_videos_are_right_in_everything(truth) -> None:
    scenes, frames = truth
    summary = judge(frames, scenes).summary()
    assert all(summary[name] == 1.0 for name in METRICS)
    assert all(summary[f"all_{name}"] == 1.0 for name in METRICS)
    assert 0.9 < summary["border_ratio"] < 1.1


def test_other_prompts_are_at_chance(truth) -> None:
    scenes, frames = truth
    shifted = judge(frames.roll(-1, 0), scenes).summary()
    for name, value in chance(scenes).items():
        assert shifted[name] <= value


@pytest.mark.parametrize("attribute", ["colour", "shape", "direction"])
def test_a_wrong_attribute_is_seen(truth, attribute: str) -> None:
    scenes, _ = truth
    few = scenes.select(slice(0, 2))
    summary = judge(render(wrong_attribute(few, attribute)), few).summary()
    assert summary[attribute] == 0.0


def test_an_object_that_vanishes_is_not_present(truth) -> None:
    scenes, frames = truth
    one = scenes.select(slice(0, 1))
    gone = frames[:1].clone()
    gone[:, 60:] = 0.5
    summary = judge(gone, one).summary()
    assert summary["colour"] == 1.0
    assert summary["present_last_frame"] == summary["present_last_chunk"] == 0.0


def test_blobs_are_no_stars() -> None:
    """Every shape is told from every other, at the smallest size."""
    x = torch.arange(64.0)[None] + 0.5
    y = torch.arange(64.0)[:, None] + 0.5
    below = (0.0, 0.0, 0.35, 0.129)  # centroid below the box centre, in radii
    for index in range(len(SHAPES)):
        distance = shape_distances(x - 32, y - 32, torch.tensor(14.0))[index]
        mask = (distance < 0)[None]
        centre = torch.tensor([[32.0, 32.0 + below[index] * 14]])
        overlaps = shape_overlaps(mask, centre, mask.sum((1, 2)).float())[0]
        assert overlaps.argmax() == index
        assert overlaps[index] > 0.95
        assert overlaps.sort().values[-2] < 0.9


def test_flicker_where_chunks_meet_is_measured() -> None:
    frames = torch.zeros(1, 33, 3, 4, 4)
    frames[:, 9:21] = 0.5  # a jump at each border, none inside
    border, inside = frame_changes(frames)
    assert border.item() == pytest.approx(0.5)
    assert inside.item() == 0.0
