"""How far one video is from another: PSNR and SSIM, frame by frame, while frames arrive.

Both compare pixels. Two videos of the same prompt may differ widely and look equally good, so the
figures tell how much a setting changed a video, not which of the two is the better one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import UserError

_WINDOW_PIXELS = 11
_WINDOW_SIGMA = 1.5  # pixels
_K1, _K2 = 0.01, 0.03


def psnr(reference: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each frame over all its pixels and channels.

    Args: reference, other: float [t, 3, H, W] in [0, 1].
    Returns: dB, float64 [t]; infinity where the frames are equal.
    """
    _check_frames(reference, other)
    error = (reference.double() - other.double()).square().mean(dim=(1, 2, 3))
    return -10 * error.log10()


def ssim(reference: Tensor, other: Tensor) -> Tensor:
    """Structural similarity of each frame, mean over pixels and over the three colour channels.

    Gaussian window of 11 x 11 pixels with sigma 1.5, K1 0.01, K2 0.03, and no padding: only
    windows that lie within the frame count.

    Args: reference, other: float [t, 3, H, W] in [0, 1], H and W at least 11.
    Returns: float64 [t], 1 where the frames are equal.
    Raises:
        UserError: frames smaller than the window.

    Reference: Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error
    visibility to structural similarity", 2004.
    """
    _check_frames(reference, other)
    height, width = reference.shape[-2:]
    if min(height, width) < _WINDOW_PIXELS:
        raise UserError(
            f"SSIM needs frames of at least {_WINDOW_PIXELS}x{_WINDOW_PIXELS} pixels, got "
            f"{width}x{height}; make the video larger"
        )
    c1, c2 = _K1**2, _K2**2
    # About grey: variances are differences of squares, and smaller squares lose fewer digits.
    x, y = reference.float() - 0.5, other.float() - 0.5
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x.square()
    variance_y = _blur(y * y) - mean_y.square()
    covariance = _blur(x * y) - mean_x * mean_y
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).double().mean(dim=(1, 2, 3))


def _blur(frames: Tensor) -> Tensor:
    """Gaussian mean of every whole window; [t, 3, H, W] to [t, 3, H - 10, W - 10]."""
    offsets = torch.arange(_WINDOW_PIXELS, device=frames.device) - _WINDOW_PIXELS // 2
    weights = torch.exp(-offsets.square() / (2 * _WINDOW_SIGMA**2))
    weights = weights / weights.sum()
    planes = frames.flatten(0, 1).unsqueeze(1)
    planes = F.conv2d(planes, weights.view(1, 1, 1, -1))
    planes = F.conv2d(planes, weights.view(1, 1, -1, 1))
    return planes.view(*frames.shape[:2], *planes.shape[-2:])


def _check_frames(reference: Tensor, other: Tensor) -> None:
    shape = reference.shape
    if other.shape != shape or len(shape) != 4 or shape[1] != 3:
        raise ValueError(
            f"frames to compare must both be [t, 3, H, W], got {list(shape)} and "
            f"{list(other.shape)}"
        )


@dataclass(frozen=True)
class VideoQuality:
    """PSNR (dB, infinity for an equal frame) and SSIM of every frame of a video."""

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]

    @property
    def mean_psnr(self) -> float:
        """Mean over the frames that differ, dB; infinity when none does."""
        different = [value for value in self.psnr if not math.isinf(value)]
        return fmean(different) if different else math.inf

    @property
    def mean_ssim(self) -> float:
        return fmean(self.ssim)

    @property
    def equal_frames(self) -> int:
        """Frames that are equal pixel for pixel."""
        return sum(map(math.isinf, self.psnr))

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, which knows no infinity: the PSNR of equal frames is None."""

        def finite(value: float) -> float | None:
            return None if math.isinf(value) else value

        return {
            "frames": len(self.psnr),
            "equal_frames": self.equal_frames,
            "mean_psnr": finite(self.mean_psnr),
            "mean_ssim": self.mean_ssim,
            "psnr": [finite(value) for value in self.psnr],
            "ssim": list(self.ssim),
        }


class QualityMeter:
    """Compares two videos as their frames come."""

    def __init__(self) -> None:
        self._psnr: list[float] = []
        self._ssim: list[float] = []

    def add(self, reference: Tensor, other: Tensor) -> None:
        """The next frames of both, float [t, 3, H, W] in [0, 1]; waits for the device."""
        self._psnr += psnr(reference, other).tolist()
        self._ssim += ssim(reference, other).tolist()

    def result(self) -> VideoQuality:
        """Of all frames so far.

        Raises:
            UserError: there were none.
        """
        if not self._psnr:
            raise UserError("there is no frame to compare; make at least one")
        return VideoQuality(tuple(self._psnr), tuple(self._ssim))
