"""GELU and rounding of rows: the value, the scale, rows without one."""

from __future__ import annotations

import pytest
import torch

from lightforcing.kernels.reference import gelu_round_rows
from lightforcing.kernels.triton_rounding import MOST_COLUMNS, gelu_round_rows_triton

INTERPRETED = not torch.cuda.is_available()
IMPLEMENTATIONS = pytest.mark.parametrize(
    "round_rows", [gelu_round_rows, gelu_round_rows_triton], ids=["reference", "triton"]
)


@IMPLEMENTATIONS
@pytest.mark.parametrize("columns", [1, 48, 1000])
def test_numbers_times_scale_are_the_gelu(round_rows, columns: int, dtype, device) -> None:
    x = (torch.randn(7, columns, device=device) * 3).to(dtype)
    x[2] *= 1000
    x[3] = 0
    rounded, scale = round_rows(x)
    assert rounded.dtype == torch.float8_e4m3fn and scale.shape == (7, 1)
    wide = x.double()
    inner = (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)
    expected = 0.5 * wide * (1 + inner.tanh())
    largest = expected.abs().amax(1, keepdim=True)
    assert torch.allclose(scale.double() * 448, largest.clamp(min=1e-12), rtol=1e-3)
    # Three bits behind the point: half a step is 2^-4 of the value, and 2^-10 below 2^-6.
    error = (rounded.double() * scale.double() - expected).abs()
    is_right = error <= expected.abs() * 2**-4 * 1.001 + scale.double() * 2**-10
    if INTERPRETED and round_rows is gelu_round_rows_triton:
        # The interpreter loses a carry (124.7 becomes 64) and cuts below 2^-6 instead of rounding.
        # Only a GPU can show those.
        value = (expected / scale.double()).abs()
        powers = value.float().to(torch.float8_e4m3fn).float().log2()
        is_right |= (powers == powers.round()) | (value < 2**-6)
    assert is_right.all()
    assert (rounded.float().abs().amax(1) == 448)[largest[:, 0] > 0].all()
    assert (rounded[3].float() == 0).all()


def test_rows_too_long_for_a_program_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match=f"at most {MOST_COLUMNS}"):
        gelu_round_rows_triton(torch.zeros(1, MOST_COLUMNS + 1, device=device).half())
