"""Normalisation of channels-last features, with the sums before it and the state behind it.

Reference: `reference_channels`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, check_tensors
from .reference_channels import check_extension
from .triton_channels import check_same_shape, check_vector, slices_between

_MOST_CHANNELS = 4096
_MOST = 2**31 - 1


@triton.jit(do_not_specialize=["positions", "batch_positions", "past_positions", "out_positions"])
def normalise_kernel(
    x,
    gain,
    bias,
    residual,
    total,
    out,
    past,
    kept,
    positions,
    batch_positions,
    past_positions,
    out_positions,
    CHANNELS: tl.constexpr,
    IS_ACTIVATED: tl.constexpr,
    IS_LARGE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A few positions with all their channels; with `kept` also of the slices in front."""
    # A division of 64-bit numbers is a hundred instructions, and every position has two.
    program = tl.program_id(0).to(tl.int64 if IS_LARGE else tl.int32)
    position = program * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    is_channel = channel < CHANNELS
    mask = (position < positions)[:, None] & is_channel[None, :]
    if kept is None:
        batch = position // batch_positions
        within = position % batch_positions
        made = mask
    else:
        batch = position // (past_positions + batch_positions)
        within = position % (past_positions + batch_positions)
        made = mask & (within >= past_positions)[:, None]
        position = batch * batch_positions + within - past_positions
    at = (position * CHANNELS)[:, None] + channel[None, :]
    value = tl.load(x + at, mask=made, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        value += tl.load(residual + at, mask=made, other=0.0).to(tl.float32)
    if total is not None:
        tl.store(total + at, value.to(total.dtype.element_ty), mask=made)
    if gain is not None:
        norm = tl.sqrt(tl.sum(value * value, 1))
        factor = tl.sqrt(CHANNELS * 1.0) / tl.maximum(norm, 1e-12)
        value = value * factor[:, None]
        value *= tl.load(gain + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        if IS_ACTIVATED:
            value = value / (1.0 + tl.exp(-value))
        value = value.to(out.dtype.element_ty)
        if kept is not None:
            # What was there before is copied, what comes after the next call's start is kept.
            state = batch * past_positions + within
            if past is None:
                value = tl.where(made, value, 0.0)
            else:
                old = (state * CHANNELS)[:, None] + channel[None, :]
                is_old = mask & (within < past_positions)[:, None]
                value = tl.where(made, value, tl.load(past + old, mask=is_old, other=0.0))
            new = ((state - batch_positions) * CHANNELS)[:, None] + channel[None, :]
            tl.store(kept + new, value, mask=mask & (within >= batch_positions)[:, None])
        target = (batch * out_positions + within) * CHANNELS
        tl.store(out + target[:, None] + channel[None, :], value, mask=mask)


def normalise_channels_triton(
    x: Tensor,
    gain: Tensor | None,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    total: Tensor | None = None,
    out: Tensor | None = None,
    past: Tensor | None = None,
    kept: Tensor | None = None,
    is_activated: bool = True,
) -> Tensor | None:
    """`reference_channels.normalise_channels` in one launch.

    Raises:
        ValueError: shapes, types or strides that the kernel cannot do, with what it can.
    """
    if x.ndim != 5 or not 1 <= x.shape[-1] <= _MOST_CHANNELS:
        raise ValueError(f"x must be [B, D, H, W, 1 to {_MOST_CHANNELS}], got {tuple(x.shape)}")
    like_x = {"x": x, "residual": residual, "total": total}
    dense = like_x | {"past": past, "kept": kept}
    given = {name: value for name, value in dense.items() if value is not None}
    check_tensors(given | ({} if out is None else {"out": out}))
    for name, value in given.items():
        if name in like_x:
            check_same_shape(name, value, x.shape)
        if not value.is_contiguous():
            raise ValueError(f"{name} must be dense, got strides {value.stride()}")
    check_extension(x, gain, out, past, kept)
    check_vector("gain", gain, x, x.shape[-1])
    check_vector("bias", bias, x, x.shape[-1])
    if gain is not None and out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        plan_normalisation(
            x, gain, bias, residual, total, out, past, kept, is_activated=is_activated
        ).run()
    return None if gain is None else out


def plan_normalisation(
    x: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    total: Tensor | None,
    out: Tensor | None,
    past: Tensor | None = None,
    kept: Tensor | None = None,
    *,
    is_activated: bool,
) -> Launch:
    """The launch for arguments that have been checked."""
    channels = x.shape[-1]
    block = triton.next_power_of_2(channels)
    # 2048 numbers on 128 threads: enough loads in flight, few enough registers.
    rows = max(2048 // block, 1)
    area = math.prod(x.shape[2:4])
    past_positions = 0 if kept is None else kept.shape[1] * area
    positions = x.shape[0] * (x.shape[1] * area + past_positions)
    out_positions = 0 if gain is None else slices_between("out", out) * area
    most = max(positions, x.shape[0] * out_positions) + rows
    arguments = {
        "x": x,
        "gain": gain,
        "bias": bias,
        "residual": residual,
        "total": total,
        "out": None if gain is None else out,
        "past": past,
        "kept": kept,
        "positions": positions,
        "batch_positions": x.shape[1] * area,
        "past_positions": past_positions,
        "out_positions": out_positions,
        "CHANNELS": channels,
        "IS_ACTIVATED": is_activated,
        "IS_LARGE": most * channels > _MOST,
        "ROWS": rows,
        "BLOCK": block,
    }
    return Launch(normalise_kernel, (triton.cdiv(positions, rows),), arguments, {"num_warps": 4})
