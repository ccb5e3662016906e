"""Colours and letters of the pictures this program draws, all with Pillow.

matplotlib is an extra of the benchmarks and may be missing where a node has to draw.
"""

from __future__ import annotations

from PIL import ImageFont

Color = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PAPER: Color = (255, 255, 255)
INK: Color = (38, 43, 51)
FAINT: Color = (120, 128, 140)
GRID: Color = (228, 231, 236)
BLUE: Color = (88, 140, 209)
PALE_BLUE: Color = (222, 231, 243)
RED: Color = (214, 93, 59)


def font(pixels: int) -> Font:
    """Pillow's own letters, so high."""
    return ImageFont.load_default(pixels)
