"""Sizes, chunk lengths, step lists, rotary positions and noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.layout import (
    FrameSize,
    chunk_lengths,
    context_lengths,
    latent_frames,
)
from lightforcing.lightforcing_core.noise import SeededNoise
from lightforcing.lightforcing_core.timesteps import SELF_FORCING_STEPS, check_steps, warp_steps
from lightforcing.lightforcing_core.wan.rope import apply_rope, axis_split, rope_angles


def test_published_sizes() -> None:
    assert latent_frames(81) == 21
    assert FrameSize(832, 480).frame_tokens == 1560
    assert FrameSize.parse("768x512").frame_tokens == 1536
    assert FrameSize(256, 128).frame_tokens == 128


@pytest.mark.parametrize("frames", [0, 2, 80, 82, -3])
def test_frame_counts_other_than_4k_plus_1_are_refused(frames: int) -> None:
    with pytest.raises(UserError, match=r"4k \+ 1"):
        latent_frames(frames)


@pytest.mark.parametrize("text", ["832", "832x", "axb", "830x480", "832x0", "-16x16"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(UserError):
        FrameSize.parse(text)


@given(st.integers(1, 60), st.integers(1, 7), st.booleans())
def test_chunks_cover_the_frames(frames: int, per_chunk: int, independent: bool) -> None:
    lengths = chunk_lengths(frames, per_chunk, independent_first_frame=independent)
    assert sum(lengths) == frames
    assert all(length == per_chunk for length in lengths[1 if independent else 0 : -1])
    assert 1 <= lengths[-1] <= per_chunk
    if independent:
        assert lengths[0] == 1


@given(st.integers(1, 60), st.integers(1, 7))
def test_given_frames_put_the_odd_remainder_first(frames: int, per_chunk: int) -> None:
    lengths = context_lengths(frames, per_chunk)
    assert sum(lengths) == frames
    assert all(length == per_chunk for length in lengths[1:])


def test_self_forcing_steps() -> None:
    """ar_systems 1.2: 1000, 937.5, 833.33, 625 with shift 5; shift 8 is the demo's mistake."""
    assert pytest.approx((1000, 937.5, 833.3333333, 625)) == SELF_FORCING_STEPS
    assert warp_steps((1000, 750, 500, 250), 8) == pytest.approx(
        (1000, 960, 888.888889, 727.272727)
    )


@pytest.mark.parametrize("steps", [(), (0,), (1001,), (500, 500), (500, 800), (float("nan"),)])
def test_step_lists_that_do_not_fall_are_refused(steps: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="step list"):
        check_steps(steps)


def test_rope_splits_as_published() -> None:
    assert axis_split(128) == (44, 42, 42)
    for head_dim in range(2, 300, 2):
        parts = axis_split(head_dim)
        assert sum(parts) == head_dim and all(p % 2 == 0 for p in parts)


@pytest.mark.parametrize("offset", [1024, 5000, 100_000])
def test_positions_past_1024_frames_depend_on_distance_only(offset: int) -> None:
    """No table ends at 1024: a window far out scores as the same window at the start."""
    q, k = torch.randn(1, 4 * 6, 2, 128), torch.randn(1, 4 * 6, 2, 128)

    def scores(first: int) -> torch.Tensor:
        cos, sin = rope_angles(range(first, first + 4), 2, 3, 128, "cpu")
        return torch.einsum("bqhd,bkhd->bhqk", apply_rope(q, cos, sin), apply_rope(k, cos, sin))

    assert torch.allclose(scores(offset), scores(0), atol=2e-4)


def test_rotation_keeps_lengths_and_position_zero() -> None:
    x = torch.randn(1, 6, 2, 64)
    cos, sin = rope_angles([0], 2, 3, 64, "cpu")
    turned = apply_rope(x, cos, sin)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    assert torch.equal(turned[:, 0], x[:, 0])


SHAPE = (1, 16, 8, 6)


def test_noise_of_a_frame_does_not_depend_on_what_else_is_drawn() -> None:
    alone = SeededNoise(5, SHAPE).initial([7])
    longer = SeededNoise(5, SHAPE)
    longer.initial(range(3))
    assert torch.equal(longer.initial(range(6, 9))[:, :, 1:2], alone)


def test_every_seed_frame_and_step_has_noise_of_its_own() -> None:
    draws = [
        SeededNoise(seed, SHAPE).renoise([frame], step)
        for seed in (0, 1, 2**64 - 1)
        for frame in (0, 1, 4096)
        for step in (1, 2)
    ] + [SeededNoise(0, SHAPE).initial([0])]
    flat = np.corrcoef(torch.stack(draws).flatten(1).numpy())
    assert np.abs(flat - np.eye(len(draws))).max() < 0.2  # 768 values: 5 sigma


def test_noise_is_standard_normal() -> None:
    values = SeededNoise(1, (1, 16, 60, 104)).initial(range(3))
    assert values.dtype == torch.float32
    assert abs(float(values.mean())) < 0.01
    assert abs(float(values.std()) - 1) < 0.01


def test_noise_is_the_same_in_every_version() -> None:
    """Pinned values: a seed must give the same video next year."""
    values = SeededNoise(42, (1, 1, 1, 2)).renoise([3], 2).flatten()
    assert values.tolist() == pytest.approx(PINNED, abs=1e-6)


PINNED = [-0.13298391, 0.39474958]


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_outside_64_bits_are_refused(seed: int) -> None:
    with pytest.raises(UserError, match="seed"):
        SeededNoise(seed, SHAPE)
