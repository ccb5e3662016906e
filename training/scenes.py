"""Procedural scenes: what they are, the sentence that describes them, and their pixels.

A scene is drawn in two parts. `sample_attributes` draws what the prompt says (colours, shapes,
motion, background, camera). Everything else (where things are) follows from `placement`, a few
standard normal numbers per scene: `lay_out` turns them into start positions by a fixed rule. That
placement is a plain Gaussian vector is what lets training tie it to a video's noise
(`coupling.py`).

Screen coordinates in pixels, x to the right, y down. Objects move with constant velocity on the
screen and bounce at its borders, in closed form, so any frame can be rendered by itself and all of
a video follows from its first frames. The background and the pillar scroll under a panning camera.

Vocabulary indices are those of `vocabulary` (COLOURS, SHAPES, ...).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .vocabulary import CAMERAS, COLOURS, DIRECTIONS, SHAPES, SIZES, SPEEDS, TEXTURES, TONES

WIDTH, HEIGHT, FRAMES = 256, 128, 81
MAX_OBJECTS = 3
PLACEMENT_DIMS = 8  # x and y of three objects, the pillar, one spare
STEADY_FRAMES = 16  # an object keeps its first direction for at least so many frames
RADII = (16.0, 24.0)  # pixels, of the circle of the same nominal size
SPEEDS_PX = (1.25, 2.5)  # pixels per frame
PAN_PX = 1.25
PILLAR_HALF_WIDTH = 16.0
HELD_OUT_SHARE = 0.12

PALETTE = (
    (0.88, 0.12, 0.14), (0.97, 0.52, 0.08), (0.95, 0.88, 0.16), (0.16, 0.72, 0.26),
    (0.16, 0.84, 0.88), (0.18, 0.30, 0.92), (0.86, 0.22, 0.78), (0.96, 0.96, 0.96),
)  # fmt: skip
TONE_COLOURS = (
    (0.48, 0.48, 0.50), (0.64, 0.57, 0.44), (0.42, 0.46, 0.33), (0.36, 0.43, 0.52),
    (0.54, 0.41, 0.36),
)  # fmt: skip
PILLAR_COLOUR = (0.27, 0.27, 0.30)
# Half extents of each shape's bounding box for radius 1; areas are of the same order.
HALF_EXTENTS = ((1.0, 1.0), (0.886, 0.886), (1.2124, 1.05), (1.284, 1.2211))
AREAS = (3.1416, 3.1399, 2.546, 2.678)  # pixels for radius 1
_TRIANGLE_RADIUS = 1.4  # circumradius
_STAR_RADIUS, _STAR_INNER = 1.35, 0.5
_DIRECTION_VECTORS = ((-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0))


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes. All tensors are on one device; B scenes, N = MAX_OBJECTS object slots.

    Attributes:
        count: int64 [B], objects present, 1..N. Slots past it hold values that mean nothing.
        colour, shape, size, direction, speed: int64 [B, N], vocabulary indices. Colours of one
            scene differ.
        texture, tone, camera: int64 [B].
        pillar: bool [B].
        placement: float32 [B, PLACEMENT_DIMS], standard normal.
    """

    count: Tensor
    colour: Tensor
    shape: Tensor
    size: Tensor
    direction: Tensor
    speed: Tensor
    texture: Tensor
    tone: Tensor
    camera: Tensor
    pillar: Tensor
    placement: Tensor

    def __len__(self) -> int:
        return self.count.shape[0]

    def select(self, index: Tensor | slice) -> Scenes:
        """Some of the scenes."""
        return Scenes(*(getattr(self, f.name)[index] for f in fields(self)))

    def to(self, device: torch.device | str) -> Scenes:
        return Scenes(*(getattr(self, f.name).to(device) for f in fields(self)))


def held_out_table() -> Tensor:
    """Which (colour, shape, direction, size) combinations are kept out of training, bool.

    A fixed hash decides, so the choice does not depend on any seed.
    """
    sizes = (len(COLOURS), len(SHAPES), len(DIRECTIONS), len(SIZES))
    table = torch.zeros(sizes, dtype=torch.bool)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in sizes)).tolist():
        digest = hashlib.sha256(f"light forcing {index}".encode()).digest()
        table[tuple(index)] = int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32
    return table


def sample_attributes(
    batch: int,
    generator: torch.Generator,
    *,
    held_out_first: bool = False,
    count_weights: Sequence[float] = (0.5, 0.35, 0.15),
) -> Scenes:
    """Draw scenes on the generator's device.

    Args:
        batch: number of scenes.
        generator: decides everything.
        held_out_first: the first object has a combination that training never shows; otherwise
            no object has one.
        count_weights: how often a scene has one object, two, three.
    """
    device = generator.device
    table = held_out_table().to(device)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, device=device)

    kept, held = (mask.nonzero() for mask in (~table, table))
    combos = kept[draw(len(kept), batch, MAX_OBJECTS)]  # [B, N, 4]
    # A few redraws give the later objects colours of their own without leaving the kept set.
    for slot in range(MAX_OBJECTS):
        if slot == 0 and held_out_first:
            combos[:, 0] = held[draw(len(held), batch)]
        for _ in range(16 if slot else 0):
            clash = (combos[:, :slot, 0] == combos[:, slot : slot + 1, 0]).any(1)
            combos[:, slot] = torch.where(
                clash[:, None], kept[draw(len(kept), batch)], combos[:, slot]
            )
    weights = torch.tensor(count_weights, device=device)
    count = torch.multinomial(weights, batch, replacement=True, generator=generator) + 1
    # After 16 redraws a clash is very rare; dropping the later objects keeps the promise.
    for slot in range(1, MAX_OBJECTS):
        clash = (combos[:, :slot, 0] == combos[:, slot : slot + 1, 0]).any(1)
        count = torch.where(clash, count.clamp(max=slot), count)
    return Scenes(
        count=count,
        colour=combos[..., 0],
        shape=combos[..., 1],
        direction=combos[..., 2],
        size=combos[..., 3],
        speed=draw(len(SPEEDS), batch, MAX_OBJECTS),
        texture=draw(len(TEXTURES), batch),
        tone=draw(len(TONES), batch),
        camera=draw(len(CAMERAS), batch),
        pillar=draw(4, batch) == 0,
        placement=torch.randn(batch, PLACEMENT_DIMS, generator=generator, device=device),
    )


def prompts(scenes: Scenes) -> list[str]:
    """One sentence per scene, in plain words of the vocabulary."""
    columns = {f.name: getattr(scenes, f.name).tolist() for f in fields(scenes)}
    result = []
    for b in range(len(scenes)):
        objects = [
            f"a {SIZES[columns['size'][b][n]]} {COLOURS[columns['colour'][b][n]]} "
            f"{SHAPES[columns['shape'][b][n]]} moving {SPEEDS[columns['speed'][b][n]]} "
            f"{DIRECTIONS[columns['direction'][b][n]]}"
            for n in range(columns["count"][b])
        ]
        scene = f"over a {TEXTURES[columns['texture'][b]]} {TONES[columns['tone'][b]]} background"
        pillar = " with a pillar" if columns["pillar"][b] else ""
        camera = CAMERAS[columns["camera"][b]]
        camera = "static camera" if camera == "static" else f"camera panning {camera}"
        text = f"{' and '.join(objects)} {scene}{pillar}, {camera}"
        result.append(text[0].upper() + text[1:])
    return result


@dataclass(frozen=True)
class Layout:
    """Where everything is, in pixels.

    Attributes:
        start, velocity, half_extent: float32 [B, N, 2] (x, y).
        radius: float32 [B, N].
        scroll: float32 [B], pixels per frame that the background moves to the right.
        pillar_x: float32 [B], centre of the pillar in frame 0.
    """

    start: Tensor
    velocity: Tensor
    half_extent: Tensor
    radius: Tensor
    scroll: Tensor
    pillar_x: Tensor

    def positions(self, times: Tensor) -> Tensor:
        """Object centres at some frames: times float [T] or [B, T] -> [B, T, N, 2]."""
        low = self.half_extent[:, None]
        limit = torch.tensor([WIDTH, HEIGHT], device=times.device, dtype=times.dtype)
        span = limit - 2 * low
        free = self.start[:, None] + self.velocity[:, None] * times[..., None, None] - low
        # A triangle wave of period 2 span is a straight flight with bounces.
        return low + span - (free.remainder(2 * span) - span).abs()


def lay_out(scenes: Scenes) -> Layout:
    """Turn placement into positions by a fixed rule.

    Each normal number becomes a uniform one over the range that its object may start in (on the
    screen, with room for STEADY_FRAMES frames in its direction); then objects that would touch in
    those frames push each other apart; last, the pillar is put where the first object does not
    meet it in those frames.
    """
    device = scenes.placement.device
    uniform = torch.special.ndtr(scenes.placement)

    def look_up(values: Sequence, index: Tensor) -> Tensor:
        return torch.tensor(values, device=device)[index]

    radius = look_up(RADII, scenes.size)
    half = look_up(HALF_EXTENTS, scenes.shape) * radius[..., None]
    speed = look_up(SPEEDS_PX, scenes.speed)
    velocity = look_up(_DIRECTION_VECTORS, scenes.direction) * speed[..., None]
    travel = velocity * (STEADY_FRAMES + 1)
    limit = torch.tensor([WIDTH, HEIGHT], device=device, dtype=torch.float32)
    low = half + 2 + (-travel).clamp(min=0)
    high = limit - half - 2 - travel.clamp(min=0)
    start = low + uniform[:, : 2 * MAX_OBJECTS].unflatten(1, (MAX_OBJECTS, 2)) * (high - low)
    start = _push_apart(start, velocity * STEADY_FRAMES / 2, half, low, high, scenes.count)
    scroll = look_up((0.0, PAN_PX, -PAN_PX), scenes.camera)
    # The first object's way relative to the scrolling world, and the pillar's free places.
    drift = torch.stack([torch.zeros_like(scroll), velocity[:, 0, 0] - scroll], 1) * STEADY_FRAMES
    way = start[:, :1, 0] + drift
    margin = half[:, 0, 0] + PILLAR_HALF_WIDTH + 3
    edge = PILLAR_HALF_WIDTH + 4
    left = (way.amin(1) - margin - edge).clamp(min=0)
    right_from = (way.amax(1) + margin).clamp(max=WIDTH - edge)
    right = WIDTH - edge - right_from
    along = uniform[:, 2 * MAX_OBJECTS] * (left + right)
    pillar_x = torch.where(along < left, edge + along, right_from + along - left)
    return Layout(start, velocity, half, radius, scroll, pillar_x)


def _push_apart(
    start: Tensor, to_middle: Tensor, half: Tensor, low: Tensor, high: Tensor, count: Tensor
) -> Tensor:
    """Move overlapping objects apart within [low, high]; all [B, N, 2] but count [B]."""
    reach = half.amax(-1)
    for _ in range(6):
        middle = start + to_middle
        push = torch.zeros_like(start)
        for i in range(MAX_OBJECTS):
            for j in range(i + 1, MAX_OBJECTS):
                gap = middle[:, j] - middle[:, i]
                distance = gap.norm(dim=-1, keepdim=True).clamp(min=1.0)
                wanted = (reach[:, i] + reach[:, j] + 4)[:, None]
                overlap = (wanted - distance).clamp(min=0) * (count > j)[:, None]
                push[:, j] += 0.5 * overlap * gap / distance
                push[:, i] -= 0.5 * overlap * gap / distance
        start = torch.minimum(torch.maximum(start + push, low), high)
    return start


def shape_distances(dx: Tensor, dy: Tensor, radius: Tensor) -> tuple[Tensor, ...]:
    """Signed distances in pixels (negative inside) to each of SHAPES, centred on its box.

    Args: dx, dy, radius: pixels, shapes that broadcast.
    """
    circle = (dx * dx + dy * dy).sqrt() - radius
    side = HALF_EXTENTS[1][0] * radius
    square = torch.maximum(dx.abs(), dy.abs()) - side
    return circle, square, _triangle(dx, dy, radius), _star(dx, dy, radius)


def _triangle(dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Equilateral, one corner up: the largest distance to its three edges."""
    inner = 0.5 * _TRIANGLE_RADIUS * radius
    y = dy - 0.25 * _TRIANGLE_RADIUS * radius  # the box centre lies above the centroid
    return torch.maximum(0.8660254 * dx.abs() - 0.5 * y, y) - inner


def _star(dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Five points, one up: fold into one tenth, then the distance to that edge's line."""
    outer = _STAR_RADIUS * radius
    x, y = dx.abs(), 0.0955 * outer - dy  # y up, from the star's centre
    for cos in (0.809017, -0.809017):
        fold = 2 * (cos * x - 0.587785 * y).clamp(min=0)
        x, y = x - cos * fold, y + 0.587785 * fold
    x, y = x.abs(), y - outer
    # The edge from the outer point to the inner one, 36 degrees further.
    edge_x, edge_y = _STAR_INNER * 0.587785, _STAR_INNER * 0.809017 - 1.0
    return (y * edge_x - x * edge_y) / (edge_x**2 + edge_y**2) ** 0.5


def render(scenes: Scenes, times: Tensor | None = None) -> Tensor:
    """Pixels of scenes.

    Args:
        scenes: B scenes.
        times: float32 [T] or [B, T] frame numbers; default 0..FRAMES - 1.

    Returns:
        float32 [B, T, 3, HEIGHT, WIDTH] in [0, 1].
    """
    device = scenes.placement.device
    if times is None:
        times = torch.arange(FRAMES, device=device, dtype=torch.float32)
    layout = lay_out(scenes)
    times = times.expand(len(scenes), times.shape[-1])
    return _paint(scenes, layout, layout.positions(times), times)


def _paint(scenes: Scenes, layout: Layout, positions: Tensor, times: Tensor) -> Tensor:
    device = positions.device
    y = torch.arange(HEIGHT, device=device, dtype=torch.float32).view(1, 1, 1, -1, 1) + 0.5
    x = torch.arange(WIDTH, device=device, dtype=torch.float32).view(1, 1, 1, 1, -1) + 0.5

    def per_scene(values: Tensor) -> Tensor:
        return values.view(-1, 1, 1, 1, 1)

    world_x = x - (layout.scroll[:, None] * times)[:, :, None, None, None]
    tone = torch.tensor(TONE_COLOURS, device=device)[scenes.tone].view(-1, 1, 3, 1, 1)
    light = 1.05 - 0.10 * y / HEIGHT
    frames = tone * light * _texture(per_scene(scenes.texture), world_x, y)
    palette = torch.tensor(PALETTE, device=device)
    for slot in reversed(range(MAX_OBJECTS)):
        centre = positions[:, :, slot]
        dx = x - centre[..., 0, None, None, None]
        dy = y - centre[..., 1, None, None, None]
        radius = per_scene(layout.radius[:, slot])
        distances = shape_distances(dx, dy, radius)
        shape = per_scene(scenes.shape[:, slot])
        distance = distances[0]
        for index, other in enumerate(distances[1:], start=1):
            distance = torch.where(shape == index, other, distance)
        cover = (0.5 - distance).clamp(0, 1) * per_scene(scenes.count > slot)
        shade = 1 - 0.10 * (dy / radius).clamp(-1, 1)
        colour = palette[scenes.colour[:, slot]].view(-1, 1, 3, 1, 1) * shade
        frames = frames + cover * (colour - frames)
    beside = (world_x - per_scene(layout.pillar_x)).abs() - PILLAR_HALF_WIDTH
    cover = (0.5 - beside).clamp(0, 1) * per_scene(scenes.pillar)
    roundness = 1.15 - 0.35 * ((beside + PILLAR_HALF_WIDTH) / PILLAR_HALF_WIDTH).clamp(max=1) ** 2
    pillar = torch.tensor(PILLAR_COLOUR, device=device).view(1, 1, 3, 1, 1) * roundness
    return (frames + cover * (pillar - frames)).clamp(0, 1)


def _texture(kind: Tensor, world_x: Tensor, y: Tensor) -> Tensor:
    """Brightness factor of the background, 0.80 to 1; a pattern of 32 pixels fixed to the world."""
    # Triangle waves in -8..8, positive on the bright half; one pixel of softness by clamping.
    across = 8 - (world_x.remainder(32) - 16).abs()
    down = 8 - (y.remainder(32) - 16).abs()
    bars = across.clamp(-0.5, 0.5) * 2
    rows = down.clamp(-0.5, 0.5) * 2
    dots = (((across - 8) ** 2 + (down - 8) ** 2).sqrt() - 6).clamp(-0.5, 0.5) * 2
    wave = torch.where(kind == 1, bars, torch.where(kind == 2, bars * rows, dots))
    return torch.where(kind == 0, torch.ones_like(wave), 0.90 + 0.10 * wave)
