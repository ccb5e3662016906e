"""Contact sheets: a few frames of several videos in one picture, to be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

_LINE_PX = 12


def contact_sheet(
    videos: Tensor, captions: Sequence[str], path: Path, *, columns: int = 8, scale: float = 1.0
) -> None:
    """Write one row of frames per video.

    Args:
        videos: [B, T, 3, H, W] in [0, 1].
        captions: one line per video.
        path: where to; the suffix decides the format.
        columns: frames shown per video, evenly spaced, first and last among them.
        scale: of each frame.
    """
    picked = torch.linspace(0, videos.shape[1] - 1, columns).round().long()
    frames = (videos[:, picked].clamp(0, 1) * 255).round().byte().cpu()
    height, width = round(frames.shape[3] * scale), round(frames.shape[4] * scale)
    row = height + _LINE_PX + 2
    sheet = Image.new("RGB", (columns * (width + 2), row * len(frames)), "white")
    draw = ImageDraw.Draw(sheet)
    for b, caption in enumerate(captions):
        draw.text((2, b * row), caption, fill="black")
        for c in range(columns):
            picture = Image.fromarray(frames[b, c].permute(1, 2, 0).numpy())
            if scale != 1:
                picture = picture.resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(picture, (c * (width + 2), b * row + _LINE_PX))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
