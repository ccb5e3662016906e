"""What is done row by row: sums and norms, rounding, rows without a value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightforcing.kernels.eight_bit import Scaling
from lightforcing.kernels.reference_rows import add_norm, rms_norm, round_rows
from lightforcing.kernels.triton_rows import (
    MOST_COLUMNS,
    add_norm_triton,
    rms_norm_triton,
    round_rows_triton,
)

INTERPRETED = not torch.cuda.is_available()
ROUNDS = pytest.mark.parametrize(
    "rounds", [round_rows, round_rows_triton], ids=["reference", "triton"]
)
RMS_NORMS = pytest.mark.parametrize(
    "norm", [rms_norm, rms_norm_triton], ids=["reference", "triton"]
)
PRODUCTS = pytest.mark.parametrize("kind", ["float", "sums"])
NORMS = pytest.mark.parametrize("norm", [add_norm, add_norm_triton], ids=["reference", "triton"])
EPS = 1e-6


def check_rounded(
    rounded: Tensor, scale: Tensor, expected: Tensor, *, is_interpreted: bool
) -> None:
    """Numbers times scale are the value, as near as e4m3 can be; the largest is 448."""
    assert rounded.dtype == torch.float8_e4m3fn and scale.shape == (len(expected), 1)
    largest = expected.abs().amax(1, keepdim=True)
    assert torch.allclose(scale.double() * 448, largest.clamp(min=1e-12), rtol=1e-3)
    # Three bits behind the point: half a step is 2^-4 of the value, and 2^-10 below 2^-6.
    error = (rounded.double() * scale.double() - expected).abs()
    is_right = error <= expected.abs() * 2**-4 * 1.001 + scale.double() * 2**-10
    if is_interpreted:
        # The interpreter loses a carry (124.7 becomes 64, and 447.99997 not 448) and cuts below
        # 2^-6 instead of rounding. Only a GPU can show those.
        value = (expected / scale.double()).abs()
        powers = value.float().to(torch.float8_e4m3fn).float().log2()
        is_right |= (powers == powers.round()) | (value < 2**-6)
    else:
        assert (rounded.float().abs().amax(1) == 448)[largest[:, 0] > 0].all()
    assert is_right.all()
    assert (rounded[largest[:, 0] == 0].float() == 0).all()


@ROUNDS
@pytest.mark.parametrize("columns", [1, 48, 64, 65, 1000])
@pytest.mark.parametrize("gelu", [False, True], ids=["as they are", "gelu"])
def test_numbers_times_scale_are_the_value(rounds, columns: int, gelu: bool, dtype, device) -> None:
    x = (torch.randn(7, 2 * columns, device=device) * 3).to(dtype)[:, :columns]  # rows apart
    x[2] *= 1000
    x[3] = 0
    if columns == 1:
        x = x.abs()  # float32 has no right digit of the GELU of one far negative number
    wide = x.double()
    if gelu:
        inner = (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)
        wide = 0.5 * wide * (1 + inner.tanh())
    is_interpreted = INTERPRETED and rounds is round_rows_triton
    check_rounded(*rounds(x, gelu=gelu), wide, is_interpreted=is_interpreted)


def product_of(
    rows: int, columns: int, kind: str, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Scaling]:
    """What a product of eight-bit numbers leaves behind: far from one, in a float type or int32."""
    x = torch.randn(rows, columns, device=device) * 2000
    x = x.int() if kind == "sums" else x.to(dtype)
    by_row, by_column = torch.rand(rows, 1, device=device), torch.rand(1, columns, device=device)
    return x, Scaling(by_row / 50, by_column / 50, torch.randn(columns, device=device).to(dtype))


def value_of(x: Tensor, scaling: Scaling | None) -> Tensor:
    """In float64."""
    if scaling is None:
        return x.double()
    rows, columns, bias = scaling
    value = x.double() * rows.double() * columns.double()
    return value if bias is None else value + bias.double()


@ROUNDS
@PRODUCTS
@pytest.mark.parametrize("columns", [64, 1000])
@pytest.mark.parametrize("gelu", [False, True], ids=["as they are", "gelu"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_products_are_rounded_as_what_they_stand_for(
    rounds, kind: str, columns: int, gelu: bool, has_bias: bool, dtype, device
) -> None:
    x, scaling = product_of(5, columns, kind, dtype, device)
    scaling = scaling if has_bias else scaling._replace(bias=None)
    wide = value_of(x, scaling)
    if gelu:
        inner = (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)
        wide = 0.5 * wide * (1 + inner.tanh())
    is_interpreted = INTERPRETED and rounds is round_rows_triton
    rounded, scale = rounds(x, gelu=gelu, scaling=scaling)
    check_rounded(rounded, scale, wide, is_interpreted=is_interpreted)


@RMS_NORMS
@pytest.mark.parametrize("columns", [1, 48, 64, 1536])
@pytest.mark.parametrize("kind", ["as it is", "float", "sums"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_rows_are_divided_by_their_root_mean_square(
    norm, columns: int, kind: str, has_bias: bool, dtype, device
) -> None:
    x, scaling = torch.randn(7, columns, device=device).to(dtype), None
    if kind != "as it is":
        x, scaling = product_of(7, columns, kind, dtype, device)
        scaling = scaling if has_bias else scaling._replace(bias=None)
    gain = torch.randn(columns, device=device).to(dtype)
    got = norm(x, gain, eps=EPS, dtype=dtype, scaling=scaling)
    wide = value_of(x, scaling)
    expected = wide / (wide.pow(2).mean(1, keepdim=True) + EPS).sqrt() * gain.double()
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert got.dtype == dtype
    assert ((got.double() - expected).abs() <= tolerance * (expected.abs() + 1e-2)).all()


def expected_norm(x: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
    """Float64, of rows in as many segments as gain and shift have."""
    x = x.double()
    x = x - x.mean(1, keepdim=True)
    x = x / (x.pow(2).mean(1, keepdim=True) + EPS).sqrt()
    for name, by_segment in (("gain", gain), ("shift", shift)):
        if by_segment is not None:
            rows = torch.cat([row.expand(len(x) // len(by_segment), -1) for row in by_segment])
            x = x * rows.double() if name == "gain" else x + rows.double()
    return x


@NORMS
@pytest.mark.parametrize("columns", [1, 48, 64, 1536])
@pytest.mark.parametrize(
    "parts",
    [
        "branch gate gain shift", "branch gain", "gain shift", "branch gate", "gain for all", "",
        "branch scales gate offset gain shift", "sums scales gate offset gain shift",
        "sums scales gate gain", "branch offset for all",
    ],
    ids=lambda parts: parts or "nothing",
)  # fmt: skip
def test_the_sum_and_its_norm(norm, columns: int, parts: str, dtype, device) -> None:
    def numbers(rows: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(rows, columns, device=device).to(kind)

    hidden = numbers(12) * 2 + 1
    hidden[4] = 0
    branch = numbers(12) if "branch" in parts else None
    scales = torch.rand(12, 1, device=device) if "scales" in parts else None
    if "sums" in parts:
        branch, scales = (numbers(12, torch.float32) * 2000).int(), scales / 1000
    table = torch.randn(3, 6, columns, device=device)  # rows of one kind lie apart
    gate = table[:, 2] if "gate" in parts else None
    offset = table[:, 3] if "offset" in parts else None
    gain = table[:, 1] if "gain" in parts else None
    if "gain for all" in parts:
        gain = numbers(1)
    if "offset for all" in parts:
        offset = numbers(1)
    shift = table[:, 0] if "shift" in parts else None
    before, total = hidden.clone(), hidden
    normed = norm(
        hidden, branch, gate, offset, branch_scales=scales, gain=gain, shift=shift, eps=EPS
    )
    assert normed.dtype == dtype
    if branch is None:
        assert torch.equal(total, before)
    else:

        def by_row(x: Tensor) -> Tensor:
            return x.double().repeat_interleave(12 // len(x), 0)

        added = branch.double() * (1 if scales is None else scales.double())
        added = added if gate is None else added * by_row(gate)
        exact = before.double() + (added if offset is None else added + by_row(offset))
        tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        # Where terms cancel, it is the last bits of the larger ones.
        near_zero = 1e-6 * (1 + added.abs().max())
        assert ((total.double() - exact).abs() <= tolerance * exact.abs() + near_zero).all()
    expected = expected_norm(total, gain, shift)  # of the sum as it is stored
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert ((normed.double() - expected).abs() <= tolerance * (expected.abs() + 1)).all()


@NORMS
@pytest.mark.parametrize("columns", [48, 1536])
def test_the_norm_in_eight_bits(norm, columns: int, dtype, device) -> None:
    hidden = torch.randn(6, columns, device=device).to(dtype)
    hidden[1] = 0
    gain, shift = torch.randn(2, 2, columns, device=device)
    shift[0] = 0
    rounded, scale = norm(hidden, gain=gain, shift=shift, eps=EPS, eight_bit=torch.float8_e4m3fn)
    expected = expected_norm(hidden, gain, shift)
    is_interpreted = INTERPRETED and norm is add_norm_triton
    check_rounded(rounded, scale, expected, is_interpreted=is_interpreted)


def test_rows_too_long_for_a_program_are_refused(device: torch.device) -> None:
    x = torch.zeros(1, MOST_COLUMNS + 1, device=device).half()
    for make in (
        lambda: add_norm_triton(x, eps=EPS),
        lambda: rms_norm_triton(x, x[0], eps=EPS, dtype=x.dtype),
        lambda: round_rows_triton(x),
    ):
        with pytest.raises(ValueError, match=f"1 to {MOST_COLUMNS} columns"):
            make()


@NORMS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"branch": (6, 4)}, "branch must be like hidden"),
        ({"gain": (3, 4)}, "gain must be .1 or 3, 8."),
        ({"gate": (4, 8)}, "6 rows are no 4 segments"),
        ({"gate": (2, 8), "shift": (3, 8)}, "gate must be .1 or 3, 8."),
        ({"offset": (3, 4)}, "offset must be .1 or 3, 8."),
        ({"branch_scales": (6,)}, "branch_scales must be float32 .6, 1."),
    ],
)
def test_shapes_that_do_not_fit_are_refused(norm, change: dict, message: str, device) -> None:
    given = {name: torch.zeros(shape, device=device) for name, shape in change.items()}
    hidden = torch.zeros(6, 8, device=device)
    branch = given.pop("branch", hidden)
    with pytest.raises(ValueError, match=message):
        norm(hidden, branch, given.pop("gate", None), eps=EPS, **given)


@ROUNDS
@RMS_NORMS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.ones(3)}, r"row_scales must be float32 \(3, 1\)"),
        ({"columns": torch.ones(1, 5)}, r"column_scales must be float32 \(1, 4\)"),
        ({"bias": torch.ones(3)}, r"bias must be \(4,\)"),
    ],
)
def test_a_scaling_that_does_not_fit_is_refused(
    rounds, norm, change: dict, message: str, device
) -> None:
    scaling = Scaling(torch.ones(3, 1), torch.ones(1, 4), None)._replace(**change)
    scaling = Scaling(*(x if x is None else x.to(device) for x in scaling))
    x = torch.ones(3, 4, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=message):
        rounds(x, scaling=scaling)
    with pytest.raises(ValueError, match=message):
        norm(x, torch.ones(4, device=device), eps=EPS, dtype=torch.float32, scaling=scaling)


def test_products_that_are_not_dense_are_refused(device) -> None:
    scaling = Scaling(torch.ones(4, 1, device=device), torch.ones(1, 3, device=device), None)
    x = torch.ones(3, 4, dtype=torch.int32, device=device).t()
    with pytest.raises(ValueError, match="x must be dense in its last axis"):
        round_rows_triton(x, scaling=scaling)


@RMS_NORMS
def test_a_gain_of_another_width_is_refused(norm, device) -> None:
    x = torch.ones(3, 8, device=device)
    with pytest.raises(ValueError, match=r"gain must be \[8\], got \[1\]"):
        norm(x, x[0, :1], eps=EPS, dtype=x.dtype)
