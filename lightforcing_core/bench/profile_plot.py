"""Where the time of each chunk goes, as a picture: rows of `bench.profile`, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ..errors import UserError
from ..outputs import check_output, replacing
from ..palette import BLUE, FAINT, GRID, INK, PAPER, RED, Color, Font, font
from .kernel_parts import ATTEND, CLEAN, COPY, DECODE, GLUE, IDLE, LINEARS, PARTS, SELECT

_WIDTH, _HEIGHT = 1080, 560  # pixels of the finished picture
_FINER = 2  # drawn larger and shrunk, which smooths every edge
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 270, 100, 62
DENOISE = "denoise"
"""Steps as a whole, where their kernels are not told apart."""
_COLORS: dict[str, Color] = {
    DENOISE: RED,
    SELECT: (46, 84, 138),
    ATTEND: BLUE,
    LINEARS: RED,
    GLUE: (240, 186, 112),
    CLEAN: (116, 168, 134),
    DECODE: (146, 118, 182),
    COPY: (150, 157, 168),
    IDLE: GRID,
}
_DARK = (DENOISE, SELECT, ATTEND, LINEARS, CLEAN, DECODE, COPY)  # white letters on them
_LEAST_HIGH = 15  # pixels of a piece that holds a number


def check_picture(path: Path) -> None:
    """Before anything is measured: whether the picture can be written.

    Raises:
        UserError: its ending is no picture format, or its folder cannot be written to.
    """
    check_output(path)
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(f"cannot draw {path}: '{path.suffix}' is no picture format; use .png")


def plot_profile(rows: Sequence[Mapping[str, Any]], title: str, note: str, path: Path) -> None:
    """Write `draw_profile`'s picture; the format follows the file's ending."""
    check_picture(path)
    with replacing(path) as temporary:
        kind = Image.registered_extensions()[path.suffix.lower()]
        draw_profile(rows, title, note).save(temporary, format=kind)


def draw_profile(rows: Sequence[Mapping[str, Any]], title: str, note: str) -> Image.Image:
    """One bar per chunk, one piece per part, bottom to top as listed at the right.

    Args:
        rows: of `Profile.rows`, the last one of the whole video. A part that no row has was not
            told apart and is not drawn.
    Returns: RGB picture of 1080 x 560 pixels.
    """
    image = Image.new("RGB", (_WIDTH * _FINER, _HEIGHT * _FINER), PAPER)
    pen = _Pen(ImageDraw.Draw(image))
    pen.text(18, 16, title, INK, 22, "lt")
    pen.text(18, 48, note, FAINT, 14, "lt")
    chunks, whole = rows[:-1], rows[-1]
    parts = [part for part in (DENOISE, *PARTS) if _key(part) in whole]
    top = _nice_above(max(row["wall_ms"] for row in chunks))
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    for i in range(6):
        y = _TOP + high * (1 - i / 5)
        pen.box(_LEFT, y, _LEFT + wide, y + 1, GRID)
        unit = " ms" if i == 5 else ""
        pen.text(_LEFT - 10, y, f"{top * i / 5:g}{unit}", FAINT, 14, "rm")
    step = wide / len(chunks)
    every = -(-len(chunks) // 21)
    for place, row in enumerate(chunks):
        left, right = _LEFT + (place + 0.14) * step, _LEFT + (place + 0.86) * step
        bottom = _TOP + float(high)
        for part in parts:
            spent = row[_key(part)]
            height = high * spent / top
            pen.box(left, bottom - height, right, bottom, _COLORS[part])
            if height >= _LEAST_HIGH and step >= 44:
                color = PAPER if part in _DARK else INK
                pen.text((left + right) / 2, bottom - height / 2, f"{spent:.1f}", color, 12, "mm")
            bottom -= height
        if step >= 30:
            pen.text((left + right) / 2, bottom - 6, f"{row['wall_ms']:.0f}", INK, 14, "ms")
        if place % every == 0:
            pen.text((left + right) / 2, _TOP + high + 9, f"{place + 1}", INK, 14, "mt")
    pen.text(_LEFT + wide / 2, _TOP + high + 32, "chunk", FAINT, 14, "mt")
    _legend(pen, whole, parts)
    return image.resize((_WIDTH, _HEIGHT), Image.Resampling.LANCZOS)


def _legend(pen: _Pen, whole: Mapping[str, Any], parts: Sequence[str]) -> None:
    """The parts from top to bottom as in the bars, with their time in the whole video."""
    left, right = _WIDTH - _RIGHT + 26, _WIDTH - 18
    y = _TOP + 8
    pen.text(right - 62, y, "ms", FAINT, 13, "rm")
    pen.text(right, y, "share", FAINT, 13, "rm")
    lines = [(part, _COLORS[part], whole[_key(part)]) for part in reversed(parts)]
    for part, color, spent in lines:
        y += 27
        pen.box(left, y - 7, left + 14, y + 7, color)
        pen.text(left + 24, y, part, INK, 15, "lm")
        pen.text(right - 62, y, f"{spent:.1f}", INK, 15, "rm")
        pen.text(right, y, f"{100 * spent / max(whole['wall_ms'], 1e-9):.1f} %", INK, 15, "rm")
    y += 22
    pen.box(left, y - 3, right, y - 2, GRID)
    y += 14
    pen.text(left + 24, y, "all", INK, 15, "lm")
    pen.text(right - 62, y, f"{whole['wall_ms']:.1f}", INK, 15, "rm")
    if whole.get("decode_beside_ms"):
        y += 34
        pen.text(left, y, "decoding beside, hidden", FAINT, 13, "lm")
        y += 18
        pen.text(left, y, f"or not: {whole['decode_beside_ms']:.1f} ms of kernels", FAINT, 13, "lm")
    if "unprofiled_ms" in whole:
        y += 34
        pen.text(left, y, "the same video unprofiled:", FAINT, 13, "lm")
        y += 18
        pen.text(left, y, f"{whole['unprofiled_ms']:.1f} ms", FAINT, 13, "lm")


def _key(part: str) -> str:
    return f"{part.replace(' ', '_')}_ms"


def _nice_above(value: float) -> float:
    """A round number not below value that is easily divided by five."""
    power = 10.0 ** math.floor(math.log10(max(value, 1e-3)))
    return next(f * power for f in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7.5, 10) if f * power >= value)


class _Pen:
    """Draws in pixels of the finished picture."""

    def __init__(self, draw: ImageDraw.ImageDraw) -> None:
        self._draw = draw

    def box(self, left: float, top: float, right: float, bottom: float, color: Color) -> None:
        if bottom - top < 0.5 / _FINER:
            return
        corners = (left * _FINER, top * _FINER, right * _FINER - 1, bottom * _FINER - 1)
        self._draw.rectangle(
            (*corners[:2], max(corners[0], corners[2]), max(corners[1], corners[3])), fill=color
        )

    def text(self, x: float, y: float, text: str, color: Color, pixels: int, anchor: str) -> None:
        place = (x * _FINER, y * _FINER)
        # On pieces of a bar letters stand as they are, elsewhere no line of the grid crosses them.
        edge = {"stroke_width": 2 * _FINER, "stroke_fill": PAPER} if anchor == "ms" else {}
        self._draw.text(place, text, fill=color, font=_font(pixels), anchor=anchor, **edge)


def _font(pixels: int) -> Font:
    return font(pixels * _FINER)
