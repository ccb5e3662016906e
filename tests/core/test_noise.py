"""Where noise comes from."""

from __future__ import annotations

import pytest
import torch

from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.noise import (
    NativeNoise,
    PartialNoise,
    ReleasedNoise,
    SeededNoise,
)

SHAPE = (1, 16, 4, 6)


def test_seeded_noise_belongs_to_its_frame_and_step() -> None:
    """In whatever order and company it is asked for."""
    noise = SeededNoise(7, SHAPE)
    together = noise.initial(range(5))
    assert torch.equal(noise.initial([3]), together[:, :, 3:4])
    assert torch.equal(
        SeededNoise(7, SHAPE).renoise([3], 1), noise.renoise(range(2, 5), 1)[:, :, 1:2]
    )
    assert not torch.equal(noise.renoise([3], 1), noise.renoise([3], 2))


def test_native_noise_is_the_hosts_clip_and_then_a_seed_per_chunk_and_step() -> None:
    start = torch.randn(1, 16, 7, 4, 6)
    noise = NativeNoise(start, 5, 3, given_frames=1)
    assert torch.equal(noise.initial(range(4, 7)), start[:, :, 4:])
    for chunk, frames in enumerate((range(1, 4), range(4, 7))):
        for step in (1, 2):
            torch.manual_seed(5 + 1000 * chunk + step - 1)
            expected = torch.randn(1, 16, 3, 4, 6)
            assert torch.equal(noise.renoise(frames, step), expected)


def test_native_noise_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    NativeNoise(torch.randn(1, 16, 3, 4, 6, generator=torch.Generator()), 0, 3).renoise([0], 1)
    assert torch.equal(torch.rand(4), expected)


def test_released_noise_is_drawn_in_the_order_of_use() -> None:
    """One generator: the clip with frames before channels, then chunk after chunk, in bfloat16."""
    noise = ReleasedNoise(11, SHAPE, 6)
    torch.manual_seed(11)
    clip = torch.randn(1, 6, 16, 4, 6, dtype=torch.bfloat16).transpose(1, 2).float()
    assert torch.equal(noise.initial(range(3)), clip[:, :, :3])
    first = torch.randn(1, 3, 16, 4, 6, dtype=torch.bfloat16).transpose(1, 2).float()
    assert torch.equal(noise.renoise(range(3), 1), first)
    assert torch.equal(noise.initial(range(3, 6)), clip[:, :, 3:])
    assert not torch.equal(noise.renoise(range(3, 6), 1), first)


def test_released_noise_draws_nothing_for_given_frames() -> None:
    with_given = ReleasedNoise(11, SHAPE, 6, given_frames=2)
    assert torch.equal(with_given.initial([2, 3]), ReleasedNoise(11, SHAPE, 6).initial([0, 1]))


def test_partial_noise_starts_between_a_video_and_noise() -> None:
    whole, video = SeededNoise(0, SHAPE), torch.randn(1, 16, 4, 4, 6)
    half = PartialNoise(whole, video, 0.25)
    expected = 0.25 * whole.initial([1, 2]) + 0.75 * video[:, :, 1:3]
    assert torch.allclose(half.initial([1, 2]), expected)
    assert torch.equal(half.renoise([1], 2), whole.renoise([1], 2))
    assert torch.equal(PartialNoise(whole, video, 1.0).initial([1]), whole.initial([1]))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_fit_64_bits(seed: int) -> None:
    for make in (
        lambda: SeededNoise(seed, SHAPE),
        lambda: NativeNoise(torch.zeros(1, 16, 1, 4, 6), seed, 3),
        lambda: ReleasedNoise(seed, SHAPE, 1),
    ):
        with pytest.raises(UserError, match="seed"):
            make()


def test_the_largest_seed_works_everywhere() -> None:
    seed = 2**64 - 1
    assert NativeNoise(torch.zeros(1, 16, 3, 4, 6), seed, 3).renoise([0], 3).isfinite().all()
    assert ReleasedNoise(seed, SHAPE, 1).initial([0]).isfinite().all()
    assert SeededNoise(seed, SHAPE).initial([0]).isfinite().all()
