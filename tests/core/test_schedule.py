"""Chunk-Aware Growth and its alternatives: published numbers, equal cost, no chunk without one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.schedule import (
    MAX_SPARSITY,
    PRESETS,
    ChunkAwareGrowth,
    GrowthSchedule,
    HandDrawn,
    LinearRamp,
    Timeline,
    UniformSparsity,
    chunk_sparsity,
    default_base,
    kept_blocks,
    schedule_report,
)
from lightforcing.lightforcing_core.schedule_plot import plot_schedule

FIVE_SECONDS = Timeline((3,) * 7)
SCHEDULES = [
    ChunkAwareGrowth(),
    UniformSparsity(0.7),
    LinearRamp(0.9, 0.3),
    HandDrawn((0.0, 0.5, 0.8)),
]


def released_list(
    target: float, base: float, frames: int, per_chunk: int, window: int
) -> list[float]:
    """The formula of reference/light_forcing.md 1.3, word for word."""
    ends = range(2 * per_chunk, frames + 1, per_chunk)
    lengths = [f if window == -1 else min(f, window) for f in ends]
    alphas = [1 / math.sqrt(f) for f in ends]
    weighted = sum(a * n for a, n in zip(alphas, lengths, strict=True))
    beta = (base - target) * sum(lengths) / weighted
    return [0.0] + [base - a * beta for a in alphas]


@pytest.mark.parametrize(
    ("preset", "frames", "window", "published"),
    [
        ("short", 21, -1, [0, 0.8270, 0.8551, 0.8718, 0.8832, 0.8917, 0.8982]),
        ("hopper", 21, -1, [0, 0.7470, 0.7751, 0.7918, 0.8032, 0.8117, 0.8182]),
        ("long", 63, 12, [0, 0.7345, 0.7740, 0.7976, 0.8137]),
    ],
)
def test_presets_are_the_released_lists(
    preset: str, frames: int, window: int, published: list[float]
) -> None:
    schedule = PRESETS[preset]
    report = schedule_report(schedule, frames=frames, frames_per_chunk=3, window_frames=window)
    expected = released_list(schedule.target, schedule.base, frames, 3, window)
    assert report["sparsities"] == pytest.approx(expected, abs=1e-12)
    assert report["sparsities"][: len(published)] == pytest.approx(published, abs=5e-5)


@pytest.mark.parametrize(
    ("preset", "block", "kept"),
    [
        ("short", 64, [72, 24, 31, 36, 42, 46, 51]),
        ("short", 128, [36, 12, 15, 18, 21, 23, 25]),
        ("hopper", 128, [36, 18, 24, 29, 35, 40, 45]),
    ],
)
def test_kept_blocks_are_the_published_counts(preset: str, block: int, kept: list[int]) -> None:
    report = schedule_report(PRESETS[preset], frames=21, frames_per_chunk=3, block_tokens=block)
    assert report["kept_blocks"] == kept
    assert report["key_blocks"] == [1536 // block * 3 * n for n in range(1, 8)]


def test_the_golden_schedule(golden_dir: Path) -> None:
    from safetensors import safe_open

    with safe_open(golden_dir / "light_forcing_attention.safetensors", "pt") as file:
        golden = json.loads(file.metadata()["golden"])
    report = schedule_report(
        ChunkAwareGrowth(golden["s_target"], golden["s_base"]),
        frames=golden["total_frames"],
        frames_per_chunk=golden["frames_per_chunk"],
        window_frames=golden["window"],
        frame_tokens=golden["frame_tokens"],
        block_tokens=golden["block"],
    )
    assert report["sparsities"] == pytest.approx(golden["sparsities"], abs=1e-9)
    assert report["kept_blocks"] == [case["topk"] for case in golden["cases"]]


@settings(max_examples=200, deadline=None)
@given(
    target=st.floats(0, 0.95),
    gap=st.floats(0, 0.9),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=12),
    given_frames=st.integers(0, 9),
    window=st.sampled_from([-1, 1, 4, 12]),
)
def test_growth_costs_what_the_uniform_target_costs(
    target: float, gap: float, lengths: list[int], given_frames: int, window: int
) -> None:
    """With clamped chunks, short ones, given frames and windows."""
    schedule = ChunkAwareGrowth(target, min(target + gap, MAX_SPARSITY))
    timeline = Timeline(tuple(lengths), given_frames, window)
    chunks = [i for i in range(len(lengths)) if not timeline.is_anchor(i)]
    ends = {i: given_frames + sum(lengths[: i + 1]) for i in chunks}
    costs = [lengths[i] * (ends[i] if window == -1 else min(ends[i], window)) for i in chunks]
    sparsities = [chunk_sparsity(schedule, timeline, i) for i in chunks]
    assert all(0 <= s <= schedule.base for s in sparsities)
    assert sparsities == sorted(sparsities)
    skipped = sum(s * c for s, c in zip(sparsities, costs, strict=True))
    assert skipped == pytest.approx(target * sum(costs), abs=1e-9 * max(sum(costs), 1))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.kind)
def test_every_chunk_has_a_sparsity_planned_or_not(schedule: GrowthSchedule) -> None:
    for timeline in (FIVE_SECONDS, Timeline((3, 3, 1), 2, 6), Timeline((3,)), Timeline((1,))):
        for chunk in (*range(30), 10_000):
            assert 0 <= chunk_sparsity(schedule, timeline, chunk) <= MAX_SPARSITY


def test_growth_goes_on_past_the_plan_towards_the_base() -> None:
    schedule = PRESETS["short"]
    values = [chunk_sparsity(schedule, FIVE_SECONDS, i) for i in (*range(1, 60), 10**6)]
    assert values == sorted(values) and len(set(values)) == len(values)
    beta = schedule.beta(FIVE_SECONDS)
    assert chunk_sparsity(schedule, FIVE_SECONDS, 9) == pytest.approx(0.98 - beta / math.sqrt(30))
    assert schedule.base - 1e-3 < values[-1] < schedule.base


def test_a_plan_of_one_chunk_still_grows() -> None:
    """An endless rollout may plan nothing: chunk 2 then meets the target by itself."""
    schedule = PRESETS["short"]
    assert chunk_sparsity(schedule, Timeline((3,)), 0) == 0
    assert chunk_sparsity(schedule, Timeline((3,)), 1) == pytest.approx(0.88)
    assert chunk_sparsity(schedule, Timeline((3,)), 2) > 0.88


def test_a_plan_of_days_is_a_matter_of_a_second() -> None:
    report = schedule_report(PRESETS["long"], frames=300_000, frames_per_chunk=3, window_frames=12)
    assert len(report["sparsities"]) == 100_000
    assert report["density_after_anchors"] == pytest.approx(0.15, abs=0.01)


def test_a_shorter_last_chunk_weighs_less() -> None:
    whole = schedule_report(PRESETS["short"], frames=21, frames_per_chunk=3)
    short = schedule_report(PRESETS["short"], frames=20, frames_per_chunk=3)
    assert short["chunk_frames"] == [3] * 6 + [2]
    assert short["visible_frames"] == [3, 6, 9, 12, 15, 18, 20]
    # Less weight on the late, sparse chunk: the early ones must be sparser for the same mean.
    assert short["sparsities"][1] > whole["sparsities"][1]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.kind)
def test_a_chunk_is_dense_while_less_video_precedes_it_than_it_has(
    schedule: GrowthSchedule,
) -> None:
    def dense(timeline: Timeline) -> list[bool]:
        values = [chunk_sparsity(schedule, timeline, i) for i in range(timeline.num_chunks)]
        return [value == 0 for value in values]

    assert dense(Timeline((3, 3, 3))) == [True, False, False]
    assert dense(Timeline((1, 3, 3))) == [True, True, False]  # independent first frame
    assert dense(Timeline((3, 3, 3), given_frames=1)) == [True, False, False]  # a start picture
    if not isinstance(schedule, HandDrawn):  # its own first value is 0
        assert dense(Timeline((3, 3, 3), given_frames=6)) == [False, False, False]
    assert dense(Timeline((1, 1, 1))) == [True, False, False]


def test_given_frames_count_as_made() -> None:
    """A video continued after 9 frames goes on where the whole video would have been."""
    schedule = PRESETS["short"]
    continued = Timeline((3,) * 4, given_frames=9)
    assert [continued.end_frame(i) for i in range(4)] == [12, 15, 18, 21]
    values = [chunk_sparsity(schedule, continued, i) for i in range(4)]
    assert values == sorted(values)


def test_the_alternatives_do_what_they_say() -> None:
    def values(schedule: GrowthSchedule, chunks: int = 7) -> list[float]:
        return [chunk_sparsity(schedule, FIVE_SECONDS, i) for i in range(chunks)]

    assert values(UniformSparsity(0.7)) == [0] + [0.7] * 6
    assert values(LinearRamp(0.5, 1.0 - 0.25), 9) == pytest.approx(
        [0, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.75, 0.75]
    )
    assert values(HandDrawn((0.9, 0.1, 0.2))) == [0, 0.1, 0.2, 0.2, 0.2, 0.2, 0.2]
    assert chunk_sparsity(LinearRamp(0.5, 0.7), Timeline((3, 3)), 1) == 0.7


def test_a_printed_list_can_be_given_back() -> None:
    report = schedule_report(PRESETS["short"], frames=21, frames_per_chunk=3)
    again = schedule_report(HandDrawn(report["sparsities"]), frames=21, frames_per_chunk=3)
    assert again["sparsities"] == report["sparsities"]


def test_a_target_of_zero_is_dense() -> None:
    report = schedule_report(ChunkAwareGrowth(0, default_base(0)), frames=30, frames_per_chunk=3)
    assert set(report["sparsities"]) == {0.0}
    assert report["kept_blocks"] == report["key_blocks"]
    assert report["density"] == 1


def test_no_row_is_left_without_a_block() -> None:
    assert kept_blocks(0.999, 12) == 1
    assert kept_blocks(0.0, 12) == 12
    assert kept_blocks(0.9, 24) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChunkAwareGrowth(1.0, 1.0), "target sparsity"),
        (lambda: ChunkAwareGrowth(-0.1, 0.5), "target sparsity"),
        (lambda: ChunkAwareGrowth(0.9, 0.8), "must not be below"),
        (lambda: ChunkAwareGrowth(float("nan")), "target sparsity"),
        (lambda: UniformSparsity(1.5), "within 0 and"),
        (lambda: LinearRamp(0.5, 2), "last sparsity"),
        (lambda: HandDrawn(()), "empty list"),
        (lambda: HandDrawn((0, 0.5, -1)), "chunk 3"),
        (lambda: Timeline(()), "at least one chunk"),
        (lambda: Timeline((3, 0)), "at least one chunk"),
        (lambda: Timeline((3,), window_frames=0), "window frames"),
        (lambda: schedule_report(PRESETS["short"], frames=0, frames_per_chunk=3), "at least 1"),
        (
            lambda: schedule_report(PRESETS["short"], frames=3, frames_per_chunk=3, block_tokens=0),
            "at least 1",
        ),
    ],
)
def test_values_out_of_range_are_refused_in_one_line(make, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("frames", [3, 21, 600])
def test_the_plot_is_a_picture(frames: int, tmp_path: Path) -> None:
    report = schedule_report(PRESETS["short"], frames=frames, frames_per_chunk=3)
    path = tmp_path / "schedule.png"
    plot_schedule(report, path)
    with Image.open(path) as picture:
        assert picture.size == (960, 540)
        colors = picture.convert("RGB").getcolors(1 << 20)
    assert colors is not None and len(colors) > 5
    assert [p.name for p in tmp_path.iterdir()] == ["schedule.png"]


def test_a_plot_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    report = schedule_report(PRESETS["short"], frames=6, frames_per_chunk=3)
    with pytest.raises(UserError, match="no picture format"):
        plot_schedule(report, tmp_path / "schedule.txt")
    with pytest.raises(UserError, match="does not exist"):
        plot_schedule(report, tmp_path / "no" / "schedule.png")
    assert not list(tmp_path.iterdir())
