"""What is done row by row between matrix products, in plain torch: the twins of `triton_rows`.

They define what is right; the Triton kernels are held to them, and the CPU runs them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_rows

Rounded = tuple[Tensor, Tensor]
"""e4m3 numbers [N, C] and one float32 scale for each row, [N, 1]; number x scale is the value."""


def add_norm(
    hidden: Tensor,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float,
    rms: bool = False,
    eight_bit: bool = False,
) -> tuple[Tensor, Tensor | Rounded]:
    """A residual sum, and the norm of its rows for what comes next.

    Rows belong to segments of equal length, one after the other; gate, gain and shift have a row
    for each segment, and one row is for all.

    Args:
        hidden: [N, C].
        branch: [N, C], added; None: nothing is.
        gate: [segments, C], factor of the branch; None: one.
        gain, shift: [segments, C], of the normed rows; None: one and zero.
        eps: of the norm.
        rms: divide by the root mean square and leave the mean, instead of a layer norm.
        eight_bit: round the normed rows to e4m3 with a scale for each row.

    Returns:
        hidden + branch * gate in hidden's type (hidden itself without a branch), and the norm of
        that sum as stored, computed in float32 and rounded once: [N, C] in hidden's type, or
        `Rounded`.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    check_rows(hidden, branch, {"gate": gate, "gain": gain, "shift": shift})
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32

    def rows(x: Tensor) -> Tensor:
        return x.to(wide).repeat_interleave(len(hidden) // len(x), 0)

    if branch is not None:
        added = branch.to(wide) if gate is None else branch.to(wide) * rows(gate)
        hidden = (hidden.to(wide) + added).to(hidden.dtype)
    x = hidden.to(wide)
    if not rms:
        x = x - x.mean(1, keepdim=True)
    x = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + eps)
    if gain is not None:
        x = x * rows(gain)
    if shift is not None:
        x = x + rows(shift)
    return hidden, _rounded(x) if eight_bit else x.to(hidden.dtype)


def round_rows(x: Tensor, *, gelu: bool = False) -> Rounded:
    """Rows in e4m3 numbers with a scale for each.

    Args:
        x: [N, C], any float type.
        gelu: of its GELU (tanh form).

    Returns:
        See `Rounded`. A row of zeros gets a scale above zero.
    """
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return _rounded(F.gelu(wide, approximate="tanh") if gelu else wide)


def _rounded(x: Tensor) -> Rounded:
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (x / scale).to(torch.float8_e4m3fn), scale.float()
