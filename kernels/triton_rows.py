"""What is done row by row between matrix products: one launch, each number read and written once.

A row stays in registers from the residual sum to the norm and to rounding. It is held in two
pieces, the largest power of two and the rest, because widths such as 1536 and 8960 are no powers
of two and a tile must be.

Reference: `reference_rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_eight_bit, check_rms_norm, check_rows, check_scaling
from .eight_bit import LARGEST, Rounded, Scaling
from .launch import Launch, check_tensors, is_interpreted

_MOST_COLUMNS_OF_TWO = 2048  # wider rows are alone in a program
MOST_COLUMNS = 16384
"""Numbers of a row that a program can hold."""


@triton.jit
def _tile(x, at, mask):
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _sum(hidden, branch, scales, gate, offset, starts, at, valid, within):
    """Some numbers of some rows with the branch added, as they are stored."""
    offsets, mask = starts + at, valid & within
    value = tl.load(hidden + offsets, mask=mask, other=0.0)
    if branch is not None:
        more = _tile(branch, offsets, mask)
        if scales is not None:
            more *= scales
        if gate is not None:
            more *= _tile(gate, at, within)
        if offset is not None:
            more += _tile(offset, at, within)
        value = (value.to(tl.float32) + more).to(value.dtype)
        tl.store(hidden + offsets, value, mask=mask)
    return value.to(tl.float32)


@triton.jit
def scaled(value, row_scale, columns, bias, at, mask):
    """What a product stands for (`eight_bit.Scaling`); as it is where there are no columns."""
    if columns is not None:
        value *= row_scale
        value *= _tile(columns, at, mask)
        if bias is not None:
            value += _tile(bias, at, mask)
    return value


@triton.jit
def _turned(x, gain, shift, at, within):
    if gain is not None:
        x *= _tile(gain, at, within)
    if shift is not None:
        x += _tile(shift, at, within)
    return x


@triton.jit
def _gelu(x, IS_PAIRED: tl.constexpr):
    # tanh(y) = 2 sigmoid(2 y) - 1; the power is kept where a product of two is finite.
    power = -2.302208198 * (x + 0.044715 * x * x * x)
    wide = 1.0 + tl.exp2(tl.minimum(power, 60.0))
    if IS_PAIRED:
        # Reciprocals are what takes the time: one for two numbers, 1 / a = b / (a b).
        result = x * tl.inline_asm_elementwise(
            """
            {
            .reg .f32 t;
            mul.f32 t, $2, $3;
            rcp.approx.ftz.f32 t, t;
            mul.f32 $0, t, $3;
            mul.f32 $1, t, $2;
            }
            """,
            "=f,=f,f,f",
            [wide],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        result = x / wide
    return result  # what follows a return is compiled too


@triton.jit
def _magnitude(x, axis: tl.constexpr):
    """Bits of the largest magnitude: as integers they are in order, and NaN is above all."""
    return tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis)


@triton.jit
def _divisor(magnitude):
    """A scale's numerator from `_magnitude`, above zero."""
    largest = magnitude.to(tl.float32, bitcast=True)
    return tl.maximum(largest, 1e-12, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    """As another type, to the nearest; int8 for values within its range."""
    if dtype == tl.int8:
        x = (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: what is below one is rounded away
    return x.to(dtype)


@triton.jit(do_not_specialize=["segment_rows"])
def add_norm_kernel(
    hidden,  # [N, C], gets hidden + branch * branch_scales * gate + offset
    branch,  # [N, C] or None
    branch_scales,  # [N] or None
    gate,  # [segments, C] or None, rows any distance apart; so are offset, gain and shift
    offset,
    gain,
    shift,
    out,  # [N, C]
    scales,  # [N], for eight-bit numbers
    segment_rows,
    gate_stride,
    offset_stride,
    gain_stride,
    shift_stride,
    eps,
    LARGEST: tl.constexpr,  # of eight-bit numbers; 0: out is like hidden
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    """Some rows of a segment side by side, for which gate, gain and shift are read once."""
    programs = tl.cdiv(segment_rows, ROWS)
    segment = (tl.program_id(0) // programs).to(tl.int64)
    places = tl.program_id(0) % programs * ROWS + tl.arange(0, ROWS)
    valid = (places < segment_rows)[:, None]
    rows = segment * segment_rows + places
    starts = rows[:, None] * COLUMNS
    if gate is not None:
        gate += segment * gate_stride
    if offset is not None:
        offset += segment * offset_stride
    if gain is not None:
        gain += segment * gain_stride
    if shift is not None:
        shift += segment * shift_stride
    at = tl.arange(0, BLOCK)[None, :]
    within = at < BLOCK
    factors = branch_scales
    if branch_scales is not None:
        factors = tl.load(branch_scales + rows, mask=places < segment_rows, other=0.0)[:, None]
    x = _sum(hidden, branch, factors, gate, offset, starts, at, valid, within)
    if REST > 0:
        rest_at = BLOCK + tl.arange(0, REST)[None, :]
        rest_within = rest_at < COLUMNS
        rest = _sum(hidden, branch, factors, gate, offset, starts, rest_at, valid, rest_within)
    mean = tl.sum(x, 1)
    if REST > 0:
        mean += tl.sum(rest, 1)
    mean /= COLUMNS
    x -= mean[:, None]
    if REST > 0:
        rest = tl.where(rest_within, rest - mean[:, None], 0.0)
    square = tl.sum(x * x, 1)
    if REST > 0:
        square += tl.sum(rest * rest, 1)
    factor = tl.rsqrt(square / COLUMNS + eps)[:, None]
    x = _turned(x * factor, gain, shift, at, within)
    if REST > 0:
        rest = _turned(rest * factor, gain, shift, rest_at, rest_within)
    if LARGEST > 0:
        magnitude = _magnitude(x, 1)
        if REST > 0:
            rest = tl.where(rest_within, rest, 0.0)
            magnitude = tl.maximum(magnitude, _magnitude(rest, 1))
        largest = _divisor(magnitude)
        tl.store(scales + rows, largest / LARGEST, mask=places < segment_rows)
        x *= (LARGEST / largest)[:, None]
        if REST > 0:
            rest *= (LARGEST / largest)[:, None]
    tl.store(out + starts + at, _narrow(x, out.dtype.element_ty), mask=valid & within)
    if REST > 0:
        rest = _narrow(rest, out.dtype.element_ty)
        tl.store(out + starts + rest_at, rest, mask=valid & rest_within)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x,  # [N, C]
    row_scales,  # [N], with column_scales; None: x is no product
    column_scales,  # [C] or None
    bias,  # [C] or None
    gain,  # [C]
    out,  # [N, C]
    rows,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    """Some rows side by side, for which what belongs to the columns is read once."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = (row < rows)[:, None]
    starts = row[:, None].to(tl.int64) * COLUMNS
    factor = row_scales
    if row_scales is not None:
        factor = tl.load(row_scales + row, mask=row < rows, other=0.0)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    within = at < BLOCK
    value = _tile(x, starts + at, valid & within)
    value = scaled(value, factor, column_scales, bias, at, within)
    square = tl.sum(value * value, 1)
    if REST > 0:
        rest_at = BLOCK + tl.arange(0, REST)[None, :]
        rest_mask = rest_at < COLUMNS
        rest = _tile(x, starts + rest_at, valid & rest_mask)
        rest = scaled(rest, factor, column_scales, bias, rest_at, rest_mask)
        square += tl.sum(rest * rest, 1)
    factor = tl.rsqrt(square / COLUMNS + eps)[:, None]
    value = value * factor * _tile(gain, at, within)
    tl.store(out + starts + at, value.to(out.dtype.element_ty), mask=valid & within)
    if REST > 0:
        rest = rest * factor * _tile(gain, rest_at, rest_mask)
        tl.store(out + starts + rest_at, rest.to(out.dtype.element_ty), mask=valid & rest_mask)


@triton.jit
def round_rows_kernel(
    x,  # [N, C], rows any distance apart
    row_scales,  # [N], with column_scales; None: x is no product
    column_scales,  # [C]
    bias,  # [C] or None
    out,  # [N, C]
    scales,  # [N]
    x_stride,
    IS_GELU: tl.constexpr,
    IS_PAIRED: tl.constexpr,  # GELU divides two numbers of a thread at once; not interpreted
    LARGEST: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0)
    x += row.to(tl.int64) * x_stride
    out += row.to(tl.int64) * COLUMNS
    factor = row_scales
    if row_scales is not None:
        factor = tl.load(row_scales + row)
    at = tl.arange(0, BLOCK)
    within = at < BLOCK
    value = scaled(tl.load(x + at).to(tl.float32), factor, column_scales, bias, at, within)
    if IS_GELU:
        value = _gelu(value, IS_PAIRED)
    magnitude = _magnitude(value, 0)
    if REST > 0:
        rest_at = BLOCK + tl.arange(0, REST)
        rest_mask = rest_at < COLUMNS
        rest = scaled(_tile(x, rest_at, rest_mask), factor, column_scales, bias, rest_at, rest_mask)
        if IS_GELU:
            rest = _gelu(rest, IS_PAIRED)
        magnitude = tl.maximum(magnitude, _magnitude(rest, 0))
    largest = _divisor(magnitude)
    tl.store(scales + row, largest / LARGEST)
    factor = LARGEST / largest
    tl.store(out + at, _narrow(value * factor, out.dtype.element_ty))
    if REST > 0:
        tl.store(out + rest_at, _narrow(rest * factor, out.dtype.element_ty), mask=rest_mask)


def add_norm_triton(
    hidden: Tensor,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    branch_scales: Tensor | None = None,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float,
    eight_bit: torch.dtype | None = None,
) -> Tensor | Rounded:
    """`reference_rows.add_norm` in one launch; hidden and branch contiguous.

    Raises:
        ValueError: shapes, types or strides that the kernel cannot do, with what it can.
    """
    by_segment = {"gate": gate, "offset": offset, "gain": gain, "shift": shift}
    check_rows(hidden, branch, by_segment, branch_scales)
    _check_width("hidden", hidden)
    check_tensors({"hidden": hidden})
    if branch is not None and branch.dtype not in (hidden.dtype, torch.int32):
        raise ValueError(f"branch must be {hidden.dtype} or int32, got {branch.dtype}")
    for name, x in {"hidden": hidden, "branch": branch, "branch_scales": branch_scales}.items():
        _check_dense(name, x, hidden.device)
    for name, x in by_segment.items():
        if x is not None and (x.stride(1) != 1 or x.device != hidden.device):
            raise ValueError(
                f"{name} must be dense in its last axis and on {hidden.device}, got strides "
                f"{x.stride()} on {x.device}"
            )
    if eight_bit is not None:
        check_eight_bit(eight_bit)
    out = torch.empty_like(hidden, dtype=eight_bit or hidden.dtype)
    scales = torch.empty(len(hidden), 1, dtype=torch.float32, device=hidden.device)
    if hidden.numel():
        plan_add_norm(
            hidden, branch, branch_scales, gate, offset, gain, shift, out, scales, eps
        ).run()
    return (out, scales) if eight_bit else out


def rms_norm_triton(
    x: Tensor,
    gain: Tensor,
    *,
    eps: float,
    dtype: torch.dtype,
    scaling: Scaling | None = None,
) -> Tensor:
    """`reference_rows.rms_norm` in one launch; x and gain contiguous.

    Raises:
        ValueError: shapes, types or strides that the kernel cannot do, with what it can.
    """
    check_rms_norm(x, gain, scaling)
    _check_width("x", x)
    check_product("x", x, scaling)
    for name, given in {"x": x, "gain": gain}.items():
        _check_dense(name, given, x.device)
    out = torch.empty_like(x, dtype=dtype)
    if x.numel():
        plan_rms_norm(x, gain, out, eps, scaling).run()
    return out


def round_rows_triton(
    x: Tensor,
    to: torch.dtype = torch.float8_e4m3fn,
    *,
    gelu: bool = False,
    scaling: Scaling | None = None,
) -> Rounded:
    """`reference_rows.round_rows` in one launch.

    Raises:
        ValueError: shapes, types or strides that the kernel cannot do, with what it can.
    """
    check_scaling(x, scaling)
    _check_width("x", x)
    check_product("x", x, scaling)
    check_eight_bit(to)
    out = torch.empty(x.shape, dtype=to, device=x.device)
    scales = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    if x.numel():
        plan_round_rows(x, out, scales, gelu, scaling).run()
    return out, scales


def plan_add_norm(
    hidden: Tensor,
    branch: Tensor | None,
    branch_scales: Tensor | None,
    gate: Tensor | None,
    offset: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    scales: Tensor,
    eps: float,
) -> Launch:
    """The launch for arguments that have been checked."""
    by_segment = {"gate": gate, "offset": offset, "gain": gain, "shift": shift}
    segments = max((len(x) for x in by_segment.values() if x is not None), default=1)
    strides = {
        f"{name}_stride": 0 if x is None or len(x) == 1 else x.stride(0)
        for name, x in by_segment.items()
    }
    # A second row reads the tables again from registers, which pays where there are many.
    is_narrow = hidden.shape[1] <= _MOST_COLUMNS_OF_TWO
    rows = 2 if is_narrow and out.dtype != hidden.dtype else 1
    arguments = {
        "hidden": hidden,
        "branch": branch,
        "branch_scales": branch_scales,
        **by_segment,
        "out": out,
        "scales": scales,
        "segment_rows": len(hidden) // segments,
        **strides,
        "eps": eps,
        "LARGEST": LARGEST.get(out.dtype, 0.0),
        "ROWS": rows,
        **row_pieces(hidden.shape[1]),
    }
    # Rounding to integers takes more registers, and so does a wide row.
    numbers = 64 if is_narrow and out.dtype == torch.float8_e4m3fn else 32
    programs = segments * triton.cdiv(len(hidden) // segments, rows)
    warps = row_warps(rows * hidden.shape[1], numbers)
    return Launch(add_norm_kernel, (programs,), arguments, warps)


def plan_rms_norm(
    x: Tensor, gain: Tensor, out: Tensor, eps: float, scaling: Scaling | None = None
) -> Launch:
    """The launch for arguments that have been checked."""
    rows = 1 if x.shape[1] > _MOST_COLUMNS_OF_TWO else 2
    arguments = {
        "x": x,
        **scaling_arguments(scaling),
        "gain": gain,
        "out": out,
        "rows": len(x),
        "eps": eps,
        "ROWS": rows,
        **row_pieces(x.shape[1]),
    }
    warps = row_warps(rows * x.shape[1], 32 if rows == 1 else 64)
    return Launch(rms_norm_kernel, (triton.cdiv(len(x), rows),), arguments, warps)


def plan_round_rows(
    x: Tensor, out: Tensor, scales: Tensor, gelu: bool, scaling: Scaling | None = None
) -> Launch:
    """The launch for arguments that have been checked."""
    pieces, warps = row_pieces(x.shape[1]), row_warps(x.shape[1], 64)
    # A thread without a second number would be given one of no value, by which the first is then
    # divided; of a piece of a single number Triton refuses to make pairs.
    least = 2 * 32 * warps["num_warps"]
    has_pairs = pieces["BLOCK"] >= least and not 0 < pieces["REST"] < least
    arguments = {
        "x": x,
        **scaling_arguments(scaling),
        "out": out,
        "scales": scales,
        "x_stride": x.stride(0),
        "IS_GELU": gelu,
        "IS_PAIRED": has_pairs and not is_interpreted(),
        "LARGEST": LARGEST[out.dtype],
        **pieces,
    }
    return Launch(round_rows_kernel, (len(x),), arguments, warps)


def scaling_arguments(scaling: Scaling | None) -> dict[str, Tensor | None]:
    """In the names of the kernels."""
    return dict(zip(("row_scales", "column_scales", "bias"), scaling or (None,) * 3, strict=True))


def check_product(name: str, x: Tensor, scaling: Scaling | None) -> None:
    """Rows that the kernels can read: of a float type, or with a scaling also int32.

    Raises:
        ValueError: names the tensor, what was expected and what was given.
    """
    if scaling is None or x.dtype != torch.int32:
        check_tensors({name: x})
    elif x.device.type != "cuda" and not is_interpreted():
        raise ValueError(
            f"{name} is on {x.device}; Triton kernels need a CUDA device "
            "(use the torch reference elsewhere)"
        )
    elif x.stride(-1) != 1:
        raise ValueError(f"{name} must be dense in its last axis, got strides {x.stride()}")
    for part, given in scaling_arguments(scaling).items():
        _check_dense(part, given, x.device)


def _check_dense(name: str, x: Tensor | None, device: torch.device) -> None:
    if x is not None and (x.device != device or not x.is_contiguous()):
        raise ValueError(
            f"{name} must be contiguous and on {device}, got strides {x.stride()} on {x.device}"
        )


def _check_width(name: str, x: Tensor) -> None:
    if not 0 < x.shape[1] <= MOST_COLUMNS:
        raise ValueError(f"{name} must have 1 to {MOST_COLUMNS} columns, got {x.shape[1]}")


def row_pieces(columns: int) -> dict[str, int]:
    """A row as the largest power of two and the rest, in the names of the kernels."""
    block = 1 << (columns.bit_length() - 1)
    rest = columns - block
    return {"COLUMNS": columns, "BLOCK": block, "REST": triton.next_power_of_2(rest) if rest else 0}


def row_warps(columns: int, numbers: int) -> dict[str, int]:
    """So many that a thread holds about this many numbers."""
    return {"num_warps": min(max(triton.next_power_of_2(columns) // (32 * numbers), 1), 16)}
