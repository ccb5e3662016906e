"""A picture of which key blocks each query block saw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from .errors import UserError
from .palette import FAINT, GRID, INK, PAPER, RED, Color, font
from .selection_record import SelectionRecord

_MAP_WIDTH, _MAP_HEIGHT = 1060, 620  # pixels of the map at most
_LARGEST_CELL = 14  # pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 92, 92, 96, 108
_CHUNK_GAP = 6  # pixels between two chunks
_FRAME_HEIGHT = 112  # pixels of a latent frame's queries at most
_LEAST_HEIGHT = 8  # pixels of a chunk
_LEGEND_WIDTH = 720
_LEAST_TICK = 30  # pixels between two numbers on the axis
_HIDDEN: Color = (244, 245, 247)  # keys that a chunk could not see
# Of a share from 0 to 1. A tenth must already be seen, for most shares are that small.
_RAMP: tuple[tuple[float, Color], ...] = (
    (0.0, (221, 230, 241)),
    (0.1, (160, 196, 227)),
    (0.3, (84, 146, 202)),
    (0.6, (32, 92, 160)),
    (1.0, (10, 38, 84)),
)


def draw_sparsity_map(
    records: Sequence[SelectionRecord], *, layer: int | None = None, head: int | None = None
) -> Image.Image:
    """Query blocks downwards, key blocks to the right, both in the order of the video.

    Args:
        records: of the chunks to draw, in order; one or all of a video.
        layer, head: from 0; None for the mean over all.

    Returns:
        RGB picture, up to 1244 pixels wide and about 830 high.

    Raises:
        UserError: no records, or there is no such layer or head.
    """
    if not records:
        raise UserError(
            "there is no record of what attention saw; run a video with recording switched on"
        )
    shares = [record.share(layer, head) for record in records]
    first, last = records[0], records[-1]
    start = min(record.key_frames[0] for record in records)
    end = max(record.key_frames[-1] for record in records) + 1
    frames = end - start
    columns = frames * first.key_blocks
    gap = _CHUNK_GAP if len(records) <= 12 else 2
    gaps = gap * (len(records) - 1)
    width = max(round(columns * min(_LARGEST_CELL, _MAP_WIDTH / columns)), 1)
    # Rows are as high as their latent frames are long, so that time runs down evenly.
    row_frames = [len(record.query_frames) for record in records]
    frame_height = min(_FRAME_HEIGHT, (_MAP_HEIGHT - gaps) / sum(row_frames))
    heights = [max(round(frames * frame_height), _LEAST_HEIGHT) for frames in row_frames]
    size = (
        _LEFT + max(width, _LEGEND_WIDTH) + _RIGHT,
        _TOP + sum(heights) + gaps + _BOTTOM,
    )
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    frame_width = width / frames

    top = _TOP
    for record, share, height in zip(records, shares, heights, strict=True):
        band = _band(record, share, start, frames)
        # Nearest where cells grow, the mean where several fall on one pixel.
        grows = width >= columns and height >= share.shape[0]
        how = Image.Resampling.NEAREST if grows else Image.Resampling.BOX
        picture.paste(band.resize((width, height), how), (_LEFT, top))
        _draw_lines(draw, record, start, frames, top, height, frame_width)
        middle = top + height / 2
        name = "chunk " if len(records) <= 30 else ""
        if height >= 12:
            draw.text((_LEFT - 10, middle), f"{name}{record.chunk + 1}", INK, font(14), anchor="rm")
            kept = f"{100 * share.mean():.1f} %"
            draw.text((_LEFT + width + 10, middle), kept, FAINT, font(14), anchor="lm")
        top += height + gap
    bottom = top - gap
    _draw_axis(draw, start, frames, bottom, frame_width)
    _draw_legend(draw, bottom + 66, _LEFT)
    _draw_title(draw, first, last, layer, head)
    draw.text((_LEFT + width + 10, _TOP - 12), "kept", FAINT, font(14), anchor="ls")
    return picture


def _band(record: SelectionRecord, share: np.ndarray, start: int, frames: int) -> Image.Image:
    """One chunk's rows over all columns of the picture, a pixel for each pair."""
    per_frame = record.key_blocks
    colors = np.empty((share.shape[0], frames * per_frame, 3), np.uint8)
    colors[:] = _HIDDEN
    painted = _paint(share).reshape(share.shape[0], -1, per_frame, 3)
    for place, frame in enumerate(record.key_frames):
        left = (frame - start) * per_frame
        colors[:, left : left + per_frame] = painted[:, place]
    return Image.fromarray(colors)


def _paint(share: np.ndarray) -> np.ndarray:
    """Shares [...] as colours uint8 [..., 3]."""
    stops = [stop for stop, _ in _RAMP]
    channels = [np.interp(share, stops, [color[i] for _, color in _RAMP]) for i in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _draw_lines(
    draw: ImageDraw.ImageDraw,
    record: SelectionRecord,
    start: int,
    frames: int,
    top: int,
    height: int,
    frame_width: float,
) -> None:
    """Frame borders, and a frame around the chunk's own keys."""
    if frame_width >= 8:
        for frame in range(1, frames):
            x = round(_LEFT + frame * frame_width)
            draw.line((x, top, x, top + height - 1), fill=PAPER)
    own = record.query_frames
    row = height / len(own)
    if row >= 16:
        for index in range(1, len(own)):
            y = round(top + index * row)
            draw.line((_LEFT, y, _LEFT + round(frames * frame_width) - 1, y), fill=PAPER)
    left = _LEFT + (own[0] - start) * frame_width
    right = _LEFT + (own[-1] + 1 - start) * frame_width
    draw.rectangle((round(left), top, round(right) - 1, top + height - 1), outline=RED, width=2)


def _draw_axis(
    draw: ImageDraw.ImageDraw, start: int, frames: int, bottom: int, frame_width: float
) -> None:
    every = max(1, round(_LEAST_TICK / frame_width))
    for frame in range(0, frames, every):
        x = _LEFT + (frame + 0.5) * frame_width
        draw.text((x, bottom + 8), f"{start + frame + 1}", INK, font(13), anchor="mt")
    x = _LEFT + frames * frame_width / 2
    draw.text((x, bottom + 27), "latent frame of the keys", FAINT, font(14), anchor="mt")


def _draw_legend(draw: ImageDraw.ImageDraw, top: int, left: int) -> None:
    width, height = 220, 12
    ramp = _paint(np.linspace(0, 1, width)[None])[0]
    for x, color in enumerate(ramp):
        draw.line((left + x, top, left + x, top + height), fill=tuple(int(v) for v in color))
    for share in (0, 50, 100):
        place = (left + width * share / 100, top + height + 5)
        draw.text(place, f"{share} %", FAINT, font(12), anchor="mt")
    right = left + width + 16
    draw.text((right, top + 6), "of layers and heads kept it", INK, font(13), anchor="lm")
    right += 196
    draw.rectangle((right, top, right + 18, top + height), outline=RED, width=2)
    draw.text((right + 26, top + 6), "the chunk itself", INK, font(13), anchor="lm")
    right += 146
    draw.rectangle((right, top, right + 18, top + height), fill=_HIDDEN, outline=GRID)
    draw.text((right + 26, top + 6), "not there to see", INK, font(13), anchor="lm")


def _draw_title(
    draw: ImageDraw.ImageDraw,
    first: SelectionRecord,
    last: SelectionRecord,
    layer: int | None,
    head: int | None,
) -> None:
    def which(name: str, index: int | None, count: int) -> str:
        return f"mean of {count} {name}s" if index is None else f"{name} {index + 1} of {count}"

    chunks = f"chunk {first.chunk + 1}"
    if last.chunk != first.chunk:
        chunks = f"chunks {first.chunk + 1} to {last.chunk + 1}"
    draw.text((18, 16), f"What each query block saw in {chunks}", INK, font(22), anchor="lt")
    subtitle = (
        f"{which('layer', layer, first.num_layers)}, {which('head', head, first.num_heads)}; "
        f"{last.query_blocks} query blocks downwards, {first.key_blocks} key blocks a latent frame"
    )
    draw.text((18, 46), subtitle, FAINT, font(14), anchor="lt")
