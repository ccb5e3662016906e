"""A growth schedule as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from .errors import UserError
from .outputs import check_output, replacing
from .palette import BLUE, FAINT, GRID, INK, PALE_BLUE, PAPER, RED, Color, Font, font

_WIDTH, _HEIGHT = 960, 540  # pixels of the finished picture
_FINER = 2  # drawn larger and shrunk, which smooths every edge
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 76, 96, 64


def plot_schedule(report: Mapping[str, Any], path: Path) -> None:
    """Write `draw_schedule`'s picture; the format follows the file's ending.

    Raises:
        UserError: the file cannot be written, or has an ending that is no picture format.
    """
    check_output(path)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise UserError(f"cannot draw {path}: '{path.suffix}' is no picture format; use .png")
    with replacing(path) as temporary:
        # Pillow would tell the format by the ending, and the temporary file has another.
        draw_schedule(report).save(temporary, format=kind)


def draw_schedule(report: Mapping[str, Any]) -> Image.Image:
    """Curve of the sparsity by chunk, over bars of the key blocks there are and those kept.

    Args: report from `schedule.schedule_report`.
    Returns: RGB picture of 960 x 540 pixels.
    """
    canvas = _Canvas()
    sparsities: Sequence[float] = report["sparsities"]
    kept: Sequence[int] = report["kept_blocks"]
    key_blocks: Sequence[int] = report["key_blocks"]
    top = _nice_above(max(key_blocks))

    canvas.title(_title(report), _subtitle(report))
    for tenth in range(0, 11, 2):
        height = tenth / 10
        canvas.line([(0, height), (1, height)], GRID, 1)
        canvas.label(0, height, f"{10 * tenth} %", RED, "rm", dx=-10)
        canvas.label(1, height, f"{round(top * height)}", BLUE, "lm", dx=10)
    canvas.label(0, 1, "sparsity", RED, "ls", dx=-_LEFT + 18, dy=-16)
    canvas.label(1, 1, "key blocks per query block", BLUE, "rs", dx=_RIGHT - 18, dy=-16)

    step = 1 / len(sparsities)
    for chunk, (keep, total) in enumerate(zip(kept, key_blocks, strict=True)):
        left, right = (chunk + 0.2) * step, (chunk + 0.8) * step
        canvas.bar(left, right, total / top, PALE_BLUE)
        canvas.bar(left, right, keep / top, BLUE)
    points = [((i + 0.5) * step, s) for i, s in enumerate(sparsities)]
    canvas.line(points, RED, 3)
    every = -(-len(points) // 21)  # so many numbers fit side by side
    for chunk, (x, y) in enumerate(points):
        canvas.dot(x, y, 5 if every == 1 else 3, RED)
        if chunk % every == 0:
            canvas.label(x, 0, f"{chunk + 1}", INK, "mt", dy=9)
            if len(points) <= 12:
                if y:  # at 0 the note would lie on the bar, which says it too
                    canvas.note(x, y, f"{100 * y:.1f} %", RED, dy=-12)
                canvas.note(x, kept[chunk] / top, f"{kept[chunk]}", INK, dy=-5)
    canvas.label(0.5, 0, "chunk", FAINT, "mt", dy=32)
    return canvas.finished()


def _title(report: Mapping[str, Any]) -> str:
    name = str(report["schedule"]).replace("_", "-")
    return f"{name[0].upper()}{name[1:]} sparsity over {len(report['sparsities'])} chunks"


def _subtitle(report: Mapping[str, Any]) -> str:
    window = report["window_frames"]
    history = "whole history" if window == -1 else f"window of {window} latent frames"
    return (
        f"{report['frames']} latent frames, {report['frames_per_chunk']} a chunk, {history}; "
        f"blocks of {report['block_tokens']} tokens; "
        f"{100 * report['density']:.1f} % of all attention is computed"
    )


def _nice_above(value: int) -> int:
    """A round number not below value that five grid lines divide into whole numbers."""
    power = 5
    while True:
        for factor in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16):
            if factor * power >= value:
                return factor * power
        power *= 10


class _Canvas:
    """Draws in shares of the plot area, 0..1 from the lower left, offsets in pixels."""

    def __init__(self) -> None:
        size = (_WIDTH * _FINER, _HEIGHT * _FINER)
        self._image = Image.new("RGB", size, PAPER)
        self._draw = ImageDraw.Draw(self._image)

    def _at(self, x: float, y: float) -> tuple[float, float]:
        wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        return _FINER * (_LEFT + x * wide), _FINER * (_TOP + (1 - y) * high)

    def line(self, points: Sequence[tuple[float, float]], color: Color, width: int) -> None:
        places = [self._at(x, y) for x, y in points]
        self._draw.line(places, fill=color, width=width * _FINER, joint="curve")

    def bar(self, left: float, right: float, height: float, color: Color) -> None:
        (x0, y0), (x1, y1) = self._at(left, height), self._at(right, 0)
        self._draw.rectangle((x0, y0, x1, y1), fill=color)

    def dot(self, x: float, y: float, radius: int, color: Color) -> None:
        cx, cy = self._at(x, y)
        for r, fill in ((radius + 2, PAPER), (radius, color)):
            r *= _FINER
            self._draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill)

    def label(
        self,
        x: float,
        y: float,
        text: str,
        color: Color,
        anchor: str,
        *,
        dx: int = 0,
        dy: int = 0,
    ) -> None:
        cx, cy = self._at(x, y)
        place = (cx + dx * _FINER, cy + dy * _FINER)
        self._draw.text(place, text, fill=color, font=_font(15), anchor=anchor)

    def note(self, x: float, y: float, text: str, color: Color, *, dy: int) -> None:
        """Small text over a point, with a margin of paper so that bars do not hide it."""
        cx, cy = self._at(x, y)
        self._draw.text(
            (cx, cy + dy * _FINER),
            text,
            fill=color,
            font=_font(13),
            anchor="ms",
            stroke_width=2 * _FINER,
            stroke_fill=PAPER,
        )

    def title(self, text: str, subtitle: str) -> None:
        place = (18 * _FINER, 16 * _FINER)
        self._draw.text(place, text, fill=INK, font=_font(22), anchor="lt")
        place = (18 * _FINER, 46 * _FINER)
        self._draw.text(place, subtitle, fill=FAINT, font=_font(14), anchor="lt")

    def finished(self) -> Image.Image:
        return self._image.resize((_WIDTH, _HEIGHT), Image.Resampling.LANCZOS)


def _font(pixels: int) -> Font:
    return font(pixels * _FINER)
