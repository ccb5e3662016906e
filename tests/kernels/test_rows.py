"""What is done row by row: sums and norms, rounding, rows without a value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightforcing.kernels.reference_rows import add_norm, round_rows
from lightforcing.kernels.triton_rows import MOST_COLUMNS, add_norm_triton, round_rows_triton

INTERPRETED = not torch.cuda.is_available()
ROUNDS = pytest.mark.parametrize(
    "rounds", [round_rows, round_rows_triton], ids=["reference", "triton"]
)
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


def expected_norm(x: Tensor, gain: Tensor | None, shift: Tensor | None, *, rms: bool) -> Tensor:
    """Float64, of rows in as many segments as gain and shift have."""
    x = x.double()
    if not rms:
        x = x - x.mean(1, keepdim=True)
    x = x / (x.pow(2).mean(1, keepdim=True) + EPS).sqrt()
    for name, by_segment in (("gain", gain), ("shift", shift)):
        if by_segment is not None:
            rows = torch.cat([row.expand(len(x) // len(by_segment), -1) for row in by_segment])
            x = x * rows.double() if name == "gain" else x + rows.double()
    return x


@NORMS
@pytest.mark.parametrize("columns", [1, 48, 64, 1536])
@pytest.mark.parametrize("rms", [False, True], ids=["layer norm", "rms"])
@pytest.mark.parametrize(
    "parts",
    ["branch gate gain shift", "branch gain", "gain shift", "branch gate", "gain for all", ""],
    ids=lambda parts: parts or "nothing",
)
def test_the_sum_and_its_norm(norm, columns: int, rms: bool, parts: str, dtype, device) -> None:
    def numbers(rows: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(rows, columns, device=device).to(kind)

    hidden = numbers(12) * 2 + 1
    hidden[4] = 0
    branch = numbers(12) if "branch" in parts else None
    table = torch.randn(3, 6, columns, device=device)  # rows of one kind lie apart
    gate = table[:, 2] if "gate" in parts else None
    gain = table[:, 1] if "gain" in parts else None
    if "all" in parts:
        gain = numbers(1)
    shift = table[:, 0] if "shift" in parts else None
    before, total = hidden.clone(), hidden
    normed = norm(hidden, branch, gate, gain=gain, shift=shift, eps=EPS, rms=rms)
    assert normed.dtype == dtype
    if branch is None:
        assert torch.equal(total, before)
    else:
        by_row = 1 if gate is None else gate.double().repeat_interleave(4, 0)
        exact = before.double() + branch.double() * by_row
        tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        assert ((total.double() - exact).abs() <= tolerance * exact.abs() + 1e-6).all()
    expected = expected_norm(total, gain, shift, rms=rms)  # of the sum as it is stored
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
    expected = expected_norm(hidden, gain, shift, rms=False)
    is_interpreted = INTERPRETED and norm is add_norm_triton
    check_rounded(rounded, scale, expected, is_interpreted=is_interpreted)


@pytest.mark.parametrize("make", [add_norm_triton, round_rows_triton])
def test_rows_too_long_for_a_program_are_refused(make, device: torch.device) -> None:
    x = torch.zeros(1, MOST_COLUMNS + 1, device=device).half()
    with pytest.raises(ValueError, match=f"1 to {MOST_COLUMNS} columns"):
        make(x, eps=EPS) if make is add_norm_triton else make(x)


@NORMS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"branch": (6, 4)}, "branch must be like hidden"),
        ({"gain": (3, 4)}, "gain must be .1 or 3, 8."),
        ({"gate": (4, 8)}, "6 rows are no 4 segments"),
        ({"gate": (2, 8), "shift": (3, 8)}, "gate must be .1 or 3, 8."),
    ],
)
def test_shapes_that_do_not_fit_are_refused(norm, change: dict, message: str, device) -> None:
    given = {name: torch.zeros(shape, device=device) for name, shape in change.items()}
    hidden = torch.zeros(6, 8, device=device)
    branch = given.pop("branch", hidden)
    with pytest.raises(ValueError, match=message):
        norm(hidden, branch, given.pop("gate", None), eps=EPS, **given)
