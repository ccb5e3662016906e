"""Validation of the judge: it must be right on true videos and must not be fooled by false ones.

Three questions: is it right on rendered truth that went through the autoencoder, is it no better
than chance on the prompts of other clips, and does it answer no when one attribute of the picture
is wrong.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..lightforcing_core.vae.taehv import TAEHV
from .autoencoder import decode_video, encode_video
from .judge import METRICS, Verdict, join, judge
from .scenes import MAX_OBJECTS, Scenes, render, sample_attributes
from .vocabulary import COLOURS, DIRECTIONS, SHAPES

_AT_ONCE = 4
_DECIDING = METRICS[:4]


@torch.no_grad()
def true_videos(scenes: Scenes, model: TAEHV | None) -> Tensor:
    """Rendered scenes, through the autoencoder if one is given: uint8 [B, T, 3, H, W]."""
    parts = []
    for start in range(0, len(scenes), _AT_ONCE):
        frames = render(scenes.select(slice(start, start + _AT_ONCE)))
        if model is not None:
            frames = decode_video(model, encode_video(model, frames))
        parts.append((frames * 255).round().byte())
    return torch.cat(parts)


def judge_bytes(videos: Tensor, scenes: Scenes) -> Verdict:
    """`judge` on uint8 videos, a few at a time."""
    return join(
        [
            judge(videos[s : s + _AT_ONCE].float() / 255, scenes.select(slice(s, s + _AT_ONCE)))
            for s in range(0, len(scenes), _AT_ONCE)
        ]
    )


def chance(scenes: Scenes) -> dict[str, float]:
    """What a perfect judge reads for the first object when prompts are shifted by one clip.

    The asked colour may be in the other clip by accident, then the other attributes may fit too.
    """
    other = scenes.select(torch.arange(len(scenes), device=scenes.count.device).roll(-1))
    slots = torch.arange(MAX_OBJECTS, device=scenes.count.device)
    same = (other.colour == scenes.colour[:, :1]) & (slots < other.count[:, None])
    result = {"colour": same.any(1)}
    for name in ("shape", "size", "direction"):
        agree = getattr(other, name) == getattr(scenes, name)[:, :1]
        result[name] = (same & agree).any(1)
    return {name: hits.float().mean().item() for name, hits in result.items()}


def wrong_attribute(scenes: Scenes, name: str) -> Scenes:
    """The same scenes with one attribute of the first object another one than asked."""
    number = {"colour": len(COLOURS), "shape": len(SHAPES), "direction": len(DIRECTIONS)}[name]
    values = getattr(scenes, name).clone()
    values[:, 0] = (values[:, 0] + 1) % number
    if name == "colour":
        # Not the colour of another object of the scene either, or that one would be found.
        for _ in range(MAX_OBJECTS):
            clash = (values[:, :1] == getattr(scenes, name)[:, 1:]).any(1)
            values[:, 0] = torch.where(clash, (values[:, 0] + 1) % number, values[:, 0])
    return replace(scenes, **{name: values})


def validate(model: TAEHV | None, generator: torch.Generator, clips: int) -> dict[str, object]:
    """All three questions, as shares of right answers.

    Args:
        model: autoencoder; None judges the renders themselves.
        generator: draws the scenes, as for the evaluation: the first object is a held-out one.
        clips: how many.
    """
    scenes = sample_attributes(clips, generator, held_out_first=True)
    videos = true_videos(scenes, model)
    shuffled = judge_bytes(videos.roll(-1, 0), scenes).summary()
    wrong = {}
    for name in ("colour", "shape", "direction"):
        pictures = true_videos(wrong_attribute(scenes, name), model)
        verdict = judge_bytes(pictures, scenes).summary()
        wrong[name] = verdict[name]
        if name == "colour":
            wrong["present_last_frame"] = verdict["present_last_frame"]
    return {
        "truth": judge_bytes(videos, scenes).summary(),
        "other_prompts": {name: shuffled[name] for name in _DECIDING},
        "other_prompts_chance": chance(scenes),
        "wrong_attribute": wrong,
    }
