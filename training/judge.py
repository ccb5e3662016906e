"""The judge: measures on pixels whether a video shows what its prompt asked for.

It knows the palette and the shapes of `scenes` and nothing of how a video was made. A pixel belongs
to the nearest of all colours that occur in scenes (objects, background tones, pillar), so muted
backgrounds and other objects do not count as the asked colour. Objects are found by their colour,
which is unique within a scene; every other measure looks at the found pixels.

Per described object:

- colour: enough pixels of the colour, and not a flood of them, in the first 24 frames;
- shape: of the four shapes at the found area and centroid, the asked one covers the found pixels
  best, with an overlap of at least `MIN_OVERLAP`, averaged over frames in which it is not hidden;
- size: found area within a factor of 1.5 of the asked one;
- direction: the centroid's way over the first 16 frames, before any bounce, points there;
- present: pixels of the colour in the last frame, and in the last chunk. A sliver is enough: what
  passes behind the pillar shows as little as a sixth of itself in rendered truth.

Per video: how much frames change where chunks meet, relative to elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .scenes import (
    AREAS,
    MAX_OBJECTS,
    PALETTE,
    PILLAR_COLOUR,
    RADII,
    STEADY_FRAMES,
    TONE_COLOURS,
    Scenes,
    shape_distances,
)

METRICS = ("colour", "shape", "size", "direction", "present_last_frame", "present_last_chunk")
FIRST_CHUNK_FRAMES, CHUNK_FRAMES = 9, 12
MIN_OVERLAP = 0.7
_MIN_SHARE, _MAX_SHARE = 0.35, 3.0  # of the expected area, to count as found
_PRESENT_SHARE = 0.12
_MIN_TRAVEL_PX = 6.0
_SIZE_FACTOR = 1.5
_EARLY_FRAMES = 24
# Area centroids below the centre of the bounding box, in radii.
_CENTROID_BELOW = (0.0, 0.0, 0.35, 0.129)


@dataclass(frozen=True)
class Verdict:
    """Measurements of a batch of videos.

    Attributes:
        right: bool [B, N, len(METRICS)]; slots past `count` are meaningless.
        count: int64 [B], described objects.
        border_change, inside_change: float32 [B], mean absolute change from one frame to the next
            where chunks meet and elsewhere.
    """

    right: Tensor
    count: Tensor
    border_change: Tensor
    inside_change: Tensor

    def summary(self) -> dict[str, float]:
        """Shares of right answers: the first object's by name, all objects' with `all_` before."""
        first = self.right[:, 0].float().mean(0)
        slots = torch.arange(self.right.shape[1], device=self.count.device)
        described = slots[None] < self.count[:, None]
        everything = self.right[described].float().mean(0)
        result = {name: first[i].item() for i, name in enumerate(METRICS)}
        result |= {f"all_{name}": everything[i].item() for i, name in enumerate(METRICS)}
        result["border_ratio"] = (self.border_change.mean() / self.inside_change.mean()).item()
        return result


def join(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict over several batches."""
    return Verdict(
        *(
            torch.cat([getattr(v, name) for v in verdicts])
            for name in ("right", "count", "border_change", "inside_change")
        )
    )


def classify(frames: Tensor) -> Tensor:
    """Index of the object colour of each pixel, len(PALETTE) for anything else.

    Args: frames [T, 3, H, W] in [0, 1]. Returns: int64 [T, H, W].
    """
    muted = [tuple(f * c for c in tone) for tone in TONE_COLOURS for f in (1.05, 0.95, 0.8)]
    muted += [tuple(f * c for c in PILLAR_COLOUR) for f in (1.1, 0.8)]
    nearest = torch.zeros_like(frames[:, 0], dtype=torch.int64)
    smallest = torch.full_like(frames[:, 0], torch.inf)
    for index, colour in enumerate([*PALETTE, *muted]):
        reference = torch.tensor(colour, device=frames.device).view(1, 3, 1, 1)
        distance = (frames - reference).square().sum(1)
        closer = distance < smallest
        smallest = torch.where(closer, distance, smallest)
        nearest = torch.where(closer, min(index, len(PALETTE)), nearest)
    return nearest


def _centroids(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Centroid [T, 2] (x, y) and area [T] of bool masks [T, H, W], stray pixels left out."""
    weights = mask.float()
    columns, rows = weights.sum(1), weights.sum(2)  # [T, W], [T, H]

    def median(profile: Tensor) -> Tensor:
        share = profile.cumsum(1) / profile.sum(1, keepdim=True).clamp(min=1)
        return (share < 0.5).sum(1).float()

    x = torch.arange(mask.shape[2], device=mask.device).float()
    y = torch.arange(mask.shape[1], device=mask.device).float()
    reach = 2 * max(RADII)
    near_x = (x[None] - median(columns)[:, None]).abs() < reach
    near_y = (y[None] - median(rows)[:, None]).abs() < reach
    weights = weights * near_x[:, None] * near_y[:, :, None]
    area = weights.sum((1, 2))
    safe = area.clamp(min=1)
    centre_x = (weights.sum(1) * (x + 0.5)).sum(1) / safe
    centre_y = (weights.sum(2) * (y + 0.5)).sum(1) / safe
    return torch.stack([centre_x, centre_y], 1), area


def shape_overlaps(mask: Tensor, centroids: Tensor, area: Tensor) -> Tensor:
    """Intersection over union of masks with each shape at their area and centroid.

    Args: mask bool [T, H, W], centroids [T, 2], area [T]. Returns: [T, shapes].
    """
    y = torch.arange(mask.shape[1], device=mask.device).float()[None, :, None] + 0.5
    x = torch.arange(mask.shape[2], device=mask.device).float()[None, None, :] + 0.5
    overlaps = []
    for shape, unit_area in enumerate(AREAS):
        radius = (area / unit_area).clamp(min=0.25).sqrt()[:, None, None]
        dx = x - centroids[:, 0, None, None]
        dy = y - centroids[:, 1, None, None] + _CENTROID_BELOW[shape] * radius
        inside = shape_distances(dx, dy, radius)[shape] < 0
        union = (inside | mask).sum((1, 2)).clamp(min=1)
        overlaps.append((inside & mask).sum((1, 2)) / union)
    return torch.stack(overlaps, 1)


def _judge_object(mask: Tensor, shape: int, size: int, direction: int) -> list[bool]:
    """Answers in the order of METRICS for one object; mask bool [T, H, W]."""
    expected = AREAS[shape] * RADII[size] ** 2
    centroids, area = _centroids(mask)
    share = area / expected
    early = share[:_EARLY_FRAMES].mean().item()
    found = _MIN_SHARE <= early <= _MAX_SHARE
    whole = area >= 0.85 * area.max()
    every = whole.nonzero()[::4, 0]
    overlap = shape_overlaps(mask[every], centroids[every], area[every]).mean(0)
    best = int(overlap.argmax())
    typical = (area[whole].mean() / expected).item()
    way = centroids[STEADY_FRAMES - 3 : STEADY_FRAMES].mean(0) - centroids[:3].mean(0)
    axis = int(way.abs().argmax())
    pointing = 2 * axis + int(way[axis] > 0)  # DIRECTIONS: left, right, up, down
    moved = way[axis].abs().item() >= _MIN_TRAVEL_PX and bool((area[:STEADY_FRAMES] > 0).all())
    return [
        found,
        found and best == shape and overlap[best].item() >= MIN_OVERLAP,
        found and 1 / _SIZE_FACTOR <= typical <= _SIZE_FACTOR,
        found and moved and pointing == direction,
        share[-1].item() >= _PRESENT_SHARE,
        share[-CHUNK_FRAMES:].max().item() >= _PRESENT_SHARE,
    ]


def judge(frames: Tensor, scenes: Scenes) -> Verdict:
    """Measure videos against the scenes that their prompts describe.

    Args:
        frames: [B, T, 3, H, W] in [0, 1], whole videos.
        scenes: what was asked; placement is not looked at.
    """
    right = torch.zeros(len(scenes), MAX_OBJECTS, len(METRICS), dtype=torch.bool)
    colours, shapes = scenes.colour.tolist(), scenes.shape.tolist()
    sizes, directions = scenes.size.tolist(), scenes.direction.tolist()
    for b, count in enumerate(scenes.count.tolist()):
        nearest = classify(frames[b].float())
        for n in range(count):
            answers = _judge_object(
                nearest == colours[b][n], shapes[b][n], sizes[b][n], directions[b][n]
            )
            right[b, n] = torch.tensor(answers)
    border, inside = frame_changes(frames)
    return Verdict(right, scenes.count.cpu(), border.cpu(), inside.cpu())


def frame_changes(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Mean absolute change between frames where chunks meet, and elsewhere: [B] each."""
    change = torch.stack(
        [(f[1:].float() - f[:-1].float()).abs().mean((1, 2, 3)) for f in frames]
    )  # [B, T - 1]
    border = torch.zeros(change.shape[1], dtype=torch.bool, device=frames.device)
    border[FIRST_CHUNK_FRAMES - 1 :: CHUNK_FRAMES] = True
    return change[:, border].mean(1), change[:, ~border].mean(1)
