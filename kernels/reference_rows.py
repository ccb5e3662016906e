"""What is done row by row between matrix products, in plain torch: the twins of `triton_rows`.

They define what is right; the Triton kernels are held to them, and the CPU runs them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_eight_bit, check_rms_norm, check_rows, check_scaling, check_sums
from .eight_bit import LARGEST, Rounded, Scaling


def add_norm(
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
    """A residual sum, in place, and the layer norm of its rows for what comes next.

    Rows belong to segments of equal length, one after the other; gate, offset, gain and shift have
    a row for each segment, and one row is for all.

    Args:
        hidden: [N, C], to which branch * branch_scales * gate + offset is added.
        branch: [N, C], hidden's type or int32; None: nothing is added.
        gate: [segments, C], factor of the branch; None: one.
        offset: [segments, C]; None: zero.
        branch_scales: float32 [N, 1], a factor for each row of the branch; None: one.
        gain, shift: [segments, C], of the normed rows; None: one and zero.
        eps: of the norm.
        eight_bit: type of `LARGEST` that the normed rows are rounded to, with a scale for each;
            None: hidden's type.

    Returns:
        The norm of the sum as stored, computed in float32 and rounded once: [N, C] in hidden's
        type, or `Rounded`.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    by_segment = {"gate": gate, "offset": offset, "gain": gain, "shift": shift}
    check_rows(hidden, branch, by_segment, branch_scales)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32

    def rows(x: Tensor) -> Tensor:
        return x.to(wide).repeat_interleave(len(hidden) // len(x), 0)

    if branch is not None:
        added = branch.to(wide)
        if branch_scales is not None:
            added = added * branch_scales
        if gate is not None:
            added = added * rows(gate)
        if offset is not None:
            added = added + rows(offset)
        hidden.copy_(hidden.to(wide) + added)
    x = hidden.to(wide)
    x = x - x.mean(1, keepdim=True)
    x = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + eps)
    if gain is not None:
        x = x * rows(gain)
    if shift is not None:
        x = x + rows(shift)
    return _rounded(x, eight_bit) if eight_bit else x.to(hidden.dtype)


def rms_norm(
    x: Tensor,
    gain: Tensor,
    *,
    eps: float,
    dtype: torch.dtype,
    scaling: Scaling | None = None,
) -> Tensor:
    """Rows divided by their root mean square, computed in float32 and rounded once.

    Args:
        x: [N, C], any float type, or what `scaling` makes of it.
        gain: [C].
        dtype: of the result.
        scaling: x is a product, int32 too, that these belong to.

    Returns:
        [N, C].

    Raises:
        ValueError: shapes that do not fit each other.
    """
    check_rms_norm(x, gain, scaling)
    wide = _scaled(x, scaling)
    wide = wide * torch.rsqrt(wide.pow(2).mean(1, keepdim=True) + eps)
    return (wide * gain).to(dtype)


def round_rows(
    x: Tensor,
    to: torch.dtype = torch.float8_e4m3fn,
    *,
    gelu: bool = False,
    scaling: Scaling | None = None,
) -> Rounded:
    """Rows in eight-bit numbers with a scale for each.

    Args:
        x: [N, C], any float type, or what `scaling` makes of it.
        to: type of `LARGEST`.
        gelu: of its GELU (tanh form).
        scaling: x is a product, int32 too, that these belong to.

    Returns:
        See `Rounded`. A row of zeros gets a scale above zero, one with NaN in it the scale NaN.

    Raises:
        ValueError: rows are not rounded to such a type, or shapes do not fit each other.
    """
    check_scaling(x, scaling)
    wide = _scaled(x, scaling)
    return _rounded(F.gelu(wide, approximate="tanh") if gelu else wide, to)


def scale_sums(
    sums: Tensor,
    row_scales: Tensor,
    column_scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """What a product of int8 numbers stands for, computed in float32.

    Args:
        sums: int32 [N, C].
        row_scales: float32 [N, 1], of the rows multiplied.
        column_scales: float32 [1, C], of the columns.
        bias: [C] or None.
        dtype: of the result.

    Returns:
        sums * row_scales * column_scales + bias, [N, C].

    Raises:
        ValueError: shapes that do not fit each other.
    """
    check_sums(sums, row_scales, column_scales, bias)
    value = sums.float() * row_scales * column_scales
    return (value if bias is None else value + bias.float()).to(dtype)


def _scaled(x: Tensor, scaling: Scaling | None) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.to(wide) if scaling is None else scaling.of(x)


def _rounded(x: Tensor, to: torch.dtype) -> Rounded:
    check_eight_bit(to)
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST[to]
    numbers = x / scale
    if to == torch.int8:
        numbers = numbers.round().nan_to_num(0.0)  # NaN is in the scale
    return numbers.to(to), scale.float()
