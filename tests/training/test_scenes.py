"""Scenes: determinism, agreement of prompt, attributes and pixels, held-out combinations."""

from __future__ import annotations

import torch

from lightforcing.lightforcing_core.embedded import EMBEDDED_TEXT
from lightforcing.lightforcing_core.text.embedded import EmbeddedTextEncoder
from lightforcing.training.conditioning import PromptRows
from lightforcing.training.pool import sample_training
from lightforcing.training.scenes import (
    HEIGHT,
    STEADY_FRAMES,
    WIDTH,
    held_out_table,
    lay_out,
    prompts,
    render,
    sample_attributes,
)
from lightforcing.training.vocabulary import COLOURS, SHAPES, table


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_same_seed_gives_the_same_pixels_and_another_seed_others() -> None:
    times = torch.tensor([0.0, 40.0])
    first, again = (render(sample_attributes(2, _generator()), times) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, render(sample_attributes(2, _generator(1)), times))
    assert first.shape == (2, 2, 3, HEIGHT, WIDTH)
    assert first.min() >= 0 and first.max() <= 1


def test_any_frame_can_be_rendered_by_itself() -> None:
    scenes = sample_attributes(3, _generator(2))
    together = render(scenes, torch.tensor([5.0, 70.0]))
    assert torch.equal(together[:, 1:], render(scenes, torch.tensor([70.0])))
    per_scene = render(scenes, torch.tensor([[5.0], [70.0], [5.0]]))
    torch.testing.assert_close(per_scene[1], together[1, 1:])


def test_training_never_shows_a_held_out_combination_and_evaluation_does_first() -> None:
    held = held_out_table()
    assert 0.08 < held.float().mean() < 0.16
    for axis in range(4):
        assert not held.movedim(axis, 0).flatten(1).all(1).any(), "a whole value is never trained"
    encoder = EmbeddedTextEncoder.load(EMBEDDED_TEXT)
    rows = PromptRows(encoder, torch.device("cpu"))
    scenes, _ = sample_training(4096, rows, _generator(3))
    assert not held[scenes.colour, scenes.shape, scenes.direction, scenes.size].any()
    asked = sample_attributes(512, _generator(4), held_out_first=True)
    combos = held[asked.colour, asked.shape, asked.direction, asked.size]
    assert combos[:, 0].all()
    assert not combos[:, 1:].any()


def test_colours_of_a_scene_differ() -> None:
    scenes = sample_attributes(4096, _generator(5))
    for i in range(3):
        for j in range(i):
            both = scenes.count > i
            assert (scenes.colour[both, i] != scenes.colour[both, j]).all()


def test_objects_stay_on_the_screen_and_keep_their_first_direction() -> None:
    scenes = sample_attributes(512, _generator(6))
    layout = lay_out(scenes)
    positions = layout.positions(torch.arange(81.0))
    limit = torch.tensor([WIDTH, HEIGHT])
    half = layout.half_extent[:, None]
    assert (positions >= half - 1e-3).all() and (positions <= limit - half + 1e-3).all()
    moved = positions[:, STEADY_FRAMES] - positions[:, 0]
    torch.testing.assert_close(moved, layout.velocity * STEADY_FRAMES, atol=1e-3, rtol=0)


def test_the_pillar_leaves_the_first_object_alone_at_the_start() -> None:
    scenes = sample_attributes(512, _generator(7))
    layout = lay_out(scenes)
    times = torch.arange(float(STEADY_FRAMES))
    objects = layout.positions(times)[:, :, 0, 0]
    pillars = layout.pillar_x[:, None] + layout.scroll[:, None] * times
    gap = (objects - pillars).abs() - layout.half_extent[:, :1, 0]
    assert gap.min() > 15


def test_prompts_name_every_object_once_in_order() -> None:
    scenes = sample_attributes(64, _generator(8))
    for b, prompt in enumerate(prompts(scenes)):
        words = prompt.lower().replace(",", "").split()
        count = scenes.count[b].item()
        assert [w for w in words if w in COLOURS] == [
            COLOURS[i] for i in scenes.colour[b, :count].tolist()
        ]
        assert [w for w in words if w in SHAPES] == [
            SHAPES[i] for i in scenes.shape[b, :count].tolist()
        ]


def test_rows_built_from_attributes_are_those_of_the_prompt() -> None:
    encoder = EmbeddedTextEncoder.load(EMBEDDED_TEXT)
    rows = PromptRows(encoder, torch.device("cpu"))
    scenes = sample_attributes(64, _generator(9))
    built = rows.indices(scenes)
    for b, prompt in enumerate(prompts(scenes)):
        pairs = [tuple(pair) for pair in built[b].tolist() if pair[0] >= 0]
        assert sorted(pairs) == sorted(encoder.tokenize(prompt)), prompt
    embedded = rows.embed(built[:1], torch.float32)[0]
    spoken = encoder.encode_rows(prompts(scenes)[0])
    assert torch.equal(embedded.sum(0), spoken.sum(0))


def test_the_shipped_vocabulary_is_the_one_training_writes() -> None:
    tensors, _ = table()
    encoder = EmbeddedTextEncoder.load(EMBEDDED_TEXT)
    assert torch.equal(encoder.word_codes, tensors["words"].float())
    assert torch.equal(encoder.role_codes, tensors["roles"].float())
