"""What is done row by row between matrix products, in plain torch: the twins of `triton_rows`.

They define what is right; the Triton kernels are held to them, and the CPU runs them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_eight_bit, check_rows, check_sums

Rounded = tuple[Tensor, Tensor]
"""Eight-bit numbers [N, C] and one float32 scale a row, [N, 1]; number x scale is the value."""

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""Types that rows are rounded to, and what the largest number of a row becomes."""


def add_norm(
    hidden: Tensor,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float,
    rms: bool = False,
    eight_bit: torch.dtype | None = None,
) -> Tensor | Rounded:
    """A residual sum, in place, and the norm of its rows for what comes next.

    Rows belong to segments of equal length, one after the other; gate, gain and shift have a row
    for each segment, and one row is for all.

    Args:
        hidden: [N, C], to which branch * gate is added.
        branch: [N, C]; None: nothing is added.
        gate: [segments, C], factor of the branch; None: one.
        gain, shift: [segments, C], of the normed rows; None: one and zero.
        eps: of the norm.
        rms: divide by the root mean square and leave the mean, instead of a layer norm.
        eight_bit: type of `LARGEST` that the normed rows are rounded to, with a scale for each;
            None: hidden's type.

    Returns:
        The norm of the sum as stored, computed in float32 and rounded once: [N, C] in hidden's
        type, or `Rounded`.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    check_rows(hidden, branch, {"gate": gate, "gain": gain, "shift": shift})
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32

    def rows(x: Tensor) -> Tensor:
        return x.to(wide).repeat_interleave(len(hidden) // len(x), 0)

    if branch is not None:
        added = branch.to(wide) if gate is None else branch.to(wide) * rows(gate)
        hidden.copy_(hidden.to(wide) + added)
    x = hidden.to(wide)
    if not rms:
        x = x - x.mean(1, keepdim=True)
    x = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + eps)
    if gain is not None:
        x = x * rows(gain)
    if shift is not None:
        x = x + rows(shift)
    return _rounded(x, eight_bit) if eight_bit else x.to(hidden.dtype)


def round_rows(x: Tensor, to: torch.dtype = torch.float8_e4m3fn, *, gelu: bool = False) -> Rounded:
    """Rows in eight-bit numbers with a scale for each.

    Args:
        x: [N, C], any float type.
        to: type of `LARGEST`.
        gelu: of its GELU (tanh form).

    Returns:
        See `Rounded`. A row of zeros gets a scale above zero, one with NaN in it the scale NaN.

    Raises:
        ValueError: rows are not rounded to such a type.
    """
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
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


def _rounded(x: Tensor, to: torch.dtype) -> Rounded:
    check_eight_bit(to, LARGEST)
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST[to]
    numbers = x / scale
    if to == torch.int8:
        numbers = numbers.round().nan_to_num(0.0)  # NaN is in the scale
    return numbers.to(to), scale.float()
