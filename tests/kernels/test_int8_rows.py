"""Rows in int8, and the sums of products of such rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightforcing.kernels.reference_rows import add_norm, round_rows, scale_sums
from lightforcing.kernels.triton_rows import add_norm_triton, round_rows_triton
from lightforcing.kernels.triton_sums import scale_sums_triton

ROUNDS = pytest.mark.parametrize(
    "rounds", [round_rows, round_rows_triton], ids=["reference", "triton"]
)
NORMS = pytest.mark.parametrize("norm", [add_norm, add_norm_triton], ids=["reference", "triton"])
SCALES = pytest.mark.parametrize(
    "scaled", [scale_sums, scale_sums_triton], ids=["reference", "triton"]
)


def check_rounded(rounded: Tensor, scale: Tensor, expected: Tensor) -> None:
    """Numbers times scale are the value within half a step; the largest is 127."""
    assert rounded.dtype == torch.int8 and scale.shape == (len(expected), 1)
    largest = expected.abs().amax(1, keepdim=True)
    assert torch.allclose(scale.double() * 127, largest.clamp(min=1e-12), rtol=1e-3)
    error = (rounded.double() * scale.double() - expected).abs()
    # Half a step, and what float32 leaves of the value itself.
    assert (error <= scale.double() * 0.5001 + expected.abs() * 1e-6).all()
    assert (rounded.short().abs().amax(1) == 127)[largest[:, 0] > 0].all()
    assert (rounded[largest[:, 0] == 0] == 0).all()


@ROUNDS
@pytest.mark.parametrize("columns", [1, 48, 64, 1000])
@pytest.mark.parametrize("gelu", [False, True], ids=["as they are", "gelu"])
def test_numbers_times_scale_are_the_value(rounds, columns: int, gelu: bool, dtype, device) -> None:
    x = (torch.randn(7, 2 * columns, device=device) * 3).to(dtype)[:, :columns]  # rows apart
    x[2] *= 1000
    x[3] = 0
    if columns == 1:
        x = x.abs()  # float32 has no right digit of the GELU of one far negative number
    wide = F.gelu(x.double(), approximate="tanh") if gelu else x.double()
    check_rounded(*rounds(x, torch.int8, gelu=gelu), wide)


@ROUNDS
def test_halves_go_to_the_nearest_even_number(rounds, device) -> None:
    halves = torch.arange(-126.5, 127, 1, device=device)
    row = torch.cat([halves, torch.tensor([127.0, 0.0], device=device)])[None]
    rounded, scale = rounds(row, torch.int8)
    assert scale.item() == 1
    assert rounded[0].tolist() == [round(x) for x in row[0].tolist()]


@ROUNDS
@pytest.mark.parametrize("to", [torch.int8, torch.float8_e4m3fn], ids=["int8", "e4m3"])
def test_a_row_that_holds_nan_has_no_scale_and_no_other_row_knows(rounds, to, device) -> None:
    x = torch.randn(3, 72, device=device)
    x[1, 70] = float("nan")
    _, scale = rounds(x, to)
    assert scale[:, 0].isnan().tolist() == [False, True, False]


@NORMS
@pytest.mark.parametrize("columns", [48, 1536])
def test_the_norm_in_int8(norm, columns: int, dtype, device) -> None:
    hidden, branch = torch.randn(2, 6, columns, device=device).to(dtype)
    hidden[1] = branch[1] = 0
    gate, gain, shift = torch.randn(3, 2, columns, device=device)
    shift[0] = 0
    rounded, scale = norm(
        hidden, branch, gate, gain=gain, shift=shift, eps=1e-6, eight_bit=torch.int8
    )
    by_row = [x.double().repeat_interleave(3, 0) for x in (gain, shift)]
    normed = F.layer_norm(hidden.double(), (columns,), eps=1e-6) * by_row[0] + by_row[1]
    assert (rounded[1] == 0).all() and torch.isfinite(scale).all()
    error = (rounded.double() * scale.double() - normed).abs()
    # Half a step, and the last bits of a norm in float32.
    assert (error <= scale.double() * 0.501 + 1e-5 * normed.abs() + 1e-5).all()


@NORMS
@ROUNDS
def test_other_types_are_refused(norm, rounds, device) -> None:
    x = torch.ones(2, 8, device=device)
    with pytest.raises(ValueError, match=r"rounded to torch\.float8_e4m3fn, torch\.int8, not to"):
        rounds(x, torch.uint8)
    with pytest.raises(ValueError, match=r"not to torch\.int16"):
        norm(x, eps=1e-6, eight_bit=torch.int16)


@SCALES
@pytest.mark.parametrize("shape", [(1, 8), (17, 48), (9, 1000)])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_sums_become_what_they_stand_for(scaled, shape, has_bias: bool, dtype, device) -> None:
    rows, columns = shape
    sums = torch.randint(-(2**27), 2**27, shape, dtype=torch.int32, device=device)
    by_row = torch.rand(rows, 1, device=device) * 1e-4
    by_column = torch.rand(1, columns, device=device) * 1e-4
    bias = torch.randn(columns, device=device).to(dtype) if has_bias else None
    got = scaled(sums, by_row, by_column, bias, dtype)
    exact = sums.double() * by_row.double() * by_column.double()
    if bias is not None:
        exact += bias.double()
    tolerance = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}[dtype]
    assert got.dtype == dtype and got.shape == shape
    # Near zero it is the last bits of float32 terms that cancel, and subnormal halves.
    assert ((got.double() - exact).abs() <= tolerance * exact.abs() + 1e-6).all()


@SCALES
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sums": torch.zeros(3, 4)}, "sums must be int32"),
        ({"row_scales": torch.ones(3)}, r"row_scales must be float32 \(3, 1\)"),
        ({"column_scales": torch.ones(1, 5)}, r"column_scales must be float32 \(1, 4\)"),
        ({"bias": torch.ones(3)}, r"bias must be \(4,\)"),
    ],
)
def test_scales_that_do_not_fit_are_refused(scaled, change: dict, message: str, device) -> None:
    given = {
        "sums": torch.zeros(3, 4, dtype=torch.int32),
        "row_scales": torch.ones(3, 1),
        "column_scales": torch.ones(1, 4),
        "bias": None,
    } | change
    given = {name: x if x is None else x.to(device) for name, x in given.items()}
    with pytest.raises(ValueError, match=message):
        scaled(**given, dtype=torch.float32)
