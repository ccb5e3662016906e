"""PSNR and SSIM are what their papers define, whatever the chunks they come in."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.video_quality import QualityMeter, psnr, ssim


def _slow_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """The formula, window by window in float64; x and y [H, W] in 0..1."""
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a = x[top : top + 11, left : left + 11]
            b = y[top : top + 11, left : left + 11]
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a = (weights * (a - mean_a) ** 2).sum()
            var_b = (weights * (b - mean_b) ** 2).sum()
            cov = (weights * (a - mean_a) * (b - mean_b)).sum()
            values.append(
                (2 * mean_a * mean_b + 0.01**2)
                * (2 * cov + 0.03**2)
                / ((mean_a**2 + mean_b**2 + 0.01**2) * (var_a + var_b + 0.03**2))
            )
    return float(np.mean(values))


def _pair(frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    reference = torch.rand(frames, 3, height, width)
    noise = torch.randn_like(reference) * torch.tensor([0.01, 0.1, 0.4])[:frames, None, None, None]
    return reference, (reference + noise).clamp(0, 1)


def test_ssim_is_the_formula_in_float64() -> None:
    reference, other = _pair(3, 17, 23)
    got = ssim(reference, other)
    for frame in range(3):
        planes = zip(reference[frame].double().numpy(), other[frame].double().numpy(), strict=True)
        expected = np.mean([_slow_ssim(x, y) for x, y in planes])
        assert got[frame].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("level", [0.0, 0.03, 0.97, 1.0])
def test_flat_frames_lose_no_digits(level: float) -> None:
    """Where variances vanish only rounding is left, and it must not show."""
    reference = torch.full((1, 3, 16, 16), level)
    other = torch.full((1, 3, 16, 16), 0.5)
    expected = (2 * level * 0.5 + 1e-4) / (level**2 + 0.25 + 1e-4)
    assert ssim(reference, other).item() == pytest.approx(expected, abs=2e-4)
    assert ssim(reference, reference).item() == pytest.approx(1, abs=1e-6)


def test_psnr_counts_the_mean_square_error() -> None:
    reference = torch.zeros(2, 3, 12, 12)
    other = torch.full_like(reference, 0.1)
    other[1] = 0.0
    assert psnr(reference, other).tolist() == pytest.approx([20.0, math.inf])


def test_chunks_do_not_matter() -> None:
    reference, other = _pair(3, 12, 14)
    whole, parts = QualityMeter(), QualityMeter()
    whole.add(reference, other)
    for frame in range(3):
        parts.add(reference[frame : frame + 1], other[frame : frame + 1])
    assert parts.result().psnr == pytest.approx(whole.result().psnr)
    assert parts.result().ssim == pytest.approx(whole.result().ssim)


def test_equal_frames_are_counted_and_do_not_make_the_mean_infinite() -> None:
    reference, other = _pair(2, 12, 12)
    other[0] = reference[0]
    meter = QualityMeter()
    meter.add(reference, other)
    quality = meter.result()
    assert quality.equal_frames == 1 and quality.mean_psnr == quality.psnr[1]
    facts = json.loads(json.dumps(quality.to_dict(), allow_nan=False))
    assert facts["psnr"][0] is None and facts["mean_psnr"] == pytest.approx(quality.psnr[1])

    same = QualityMeter()
    same.add(reference, reference)
    assert same.result().mean_psnr == math.inf
    assert same.result().to_dict()["mean_psnr"] is None


def test_what_cannot_be_compared_is_refused() -> None:
    frames = torch.rand(1, 3, 10, 16)
    with pytest.raises(UserError, match="16x10"):
        ssim(frames, frames)
    with pytest.raises(ValueError, match=r"\[1, 3, 10, 16\]"):
        psnr(frames, torch.rand(2, 3, 10, 16))
    with pytest.raises(UserError, match="no frame"):
        QualityMeter().result()
