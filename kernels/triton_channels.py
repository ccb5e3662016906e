"""Convolution and normalisation of channels-last features.

A program of the convolution makes a tile of windows by results as a matrix product. It reads the
rows of its windows as they lie in memory, so no unfolded input exists. A window's row is a run of
numbers without gaps (positions, channels inside), which is cut into equal parts whatever the number
of channels; parts beyond the border are masked. The accumulator starts as bias and residual and is
rectified at the end.

Reference: `reference_channels`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, check_tensors, compute_capability
from .reference_channels import PackedWeights

_BLOCK_M = 128
_MOST_CHANNELS = 4096
_MOST = 2**31 - 1
_LENGTHS = [
    "windows",
    "depth",
    "windows_high",
    "windows_wide",
    "height",
    "width",
    "x_slices",
    "out_slices",
    "residual_slices",
]


@triton.jit(do_not_specialize=_LENGTHS)
def convolve_kernel(
    x,
    weight,
    bias,
    residual,
    out,
    scale,
    shift,
    windows,
    depth,
    windows_high,
    windows_wide,
    height,
    width,
    x_slices,
    out_slices,
    residual_slices,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    DEPTH_TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    CELL: tl.constexpr,
    GROW: tl.constexpr,
    IS_PHASED: tl.constexpr,
    IS_RECTIFIED: tl.constexpr,
    TO_PLANES: tl.constexpr,
    RESULTS: tl.constexpr,
    TILES: tl.constexpr,
    PHASES: tl.constexpr,
    IS_LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of windows by a tile of results, of one phase."""
    # Programs that read the same windows are neighbours and meet in the cache.
    program = tl.program_id(0)
    phase = program % (PHASES * TILES) // TILES
    n = program % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    window = program // (PHASES * TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_window = window < windows
    column = window % windows_wide
    line = window // windows_wide
    row = line % windows_high
    line = line // windows_high
    index = line % depth
    batch = (line // depth).to(tl.int64 if IS_LARGE else tl.int32)
    top, left = row * STEP - 1, column * STEP - 1
    if IS_PHASED:
        top += phase // 2 % 2
        left += phase % 2

    is_result = n < RESULTS
    is_made = is_window[:, None] & is_result[None, :]
    channel = n % OUT_CHANNELS
    out_row, out_column = row * CELL, column * CELL
    out_width = windows_wide * CELL
    size = windows_high * CELL * out_width
    inside = tl.zeros_like(n)
    slice_out = index
    if IS_PHASED:
        out_row += phase // 2 % 2
        out_column += phase % 2
        slice_out = index * GROW + phase // 4
    else:
        inside = n // (OUT_CHANNELS * CELL) * out_width + n // OUT_CHANNELS % CELL
    within = out_row * out_width + out_column
    offset = (inside * OUT_CHANNELS + channel)[None, :]

    # What is added comes first: at the end, it would need registers beside the products.
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if residual is not None:
        first = ((batch * residual_slices + slice_out) * size + within) * OUT_CHANNELS
        more = tl.load(residual + (first[:, None] + offset), mask=is_made, other=0.0)
        accumulator += more.to(tl.float32)
    if bias is not None:
        offsets = tl.load(bias + channel, mask=is_result, other=0.0).to(tl.float32)
        accumulator += offsets[None, :]

    RUN: tl.constexpr = COLUMNS * CHANNELS
    PARTS: tl.constexpr = (RUN + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = DEPTH_TAPS * ROWS * PARTS
    k = tl.arange(0, BLOCK_K)
    start = (((batch * x_slices + index) * height + top) * width + left) * CHANNELS
    weights = weight + phase.to(tl.int64) * (STEPS * BLOCK_K * TILES * BLOCK_N)
    weights += k[:, None] * (TILES * BLOCK_N) + n[None, :]
    for step in range(STEPS):
        part = step % PARTS
        tap = step // PARTS
        tap_row = tap % ROWS
        at = part * BLOCK_K + k
        y = top + tap_row
        is_row = is_window & (y >= 0) & (y < height)
        if CHANNELS % BLOCK_K == 0:
            # A part lies in one position.
            position = left + part // (CHANNELS // BLOCK_K)
            mask = (is_row & (position >= 0) & (position < width))[:, None]
        else:
            position = left[:, None] + (at // CHANNELS)[None, :]
            mask = is_row[:, None] & (position >= 0) & (position < width)
            if RUN % BLOCK_K:
                mask = mask & (at < RUN)[None, :]
        skipped = (tap // ROWS * height + tap_row) * width * CHANNELS
        values = tl.load(x + (start[:, None] + (skipped + at)[None, :]), mask=mask, other=0.0)
        accumulator = tl.dot(values, tl.load(weights), accumulator)
        weights += BLOCK_K * TILES * BLOCK_N

    if TO_PLANES:
        plane = (batch * out_slices + slice_out) * OUT_CHANNELS
        target = (plane * size + within)[:, None] + (channel * size + inside)[None, :]
        accumulator = accumulator * scale + shift
        is_bad = (accumulator != accumulator) | (tl.abs(accumulator) == float("inf"))
        limited = tl.minimum(tl.maximum(accumulator, 0.0), 1.0)
        tl.store(out + target, tl.where(is_bad, float("nan"), limited), mask=is_made)
    else:
        if IS_RECTIFIED:
            # Not a maximum, which would turn NaN to zero.
            accumulator = tl.where(accumulator < 0.0, 0.0, accumulator)
        first = ((batch * out_slices + slice_out) * size + within) * OUT_CHANNELS
        target = out + (first[:, None] + offset)
        tl.store(target, accumulator.to(out.dtype.element_ty), mask=is_made)


@triton.jit(do_not_specialize=["positions", "batch_positions", "out_positions"])
def normalise_kernel(
    x,
    gain,
    bias,
    residual,
    total,
    out,
    positions,
    batch_positions,
    out_positions,
    CHANNELS: tl.constexpr,
    IS_ACTIVATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A few positions with all their channels."""
    position = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    is_channel = channel < CHANNELS
    mask = (position < positions)[:, None] & is_channel[None, :]
    at = (position * CHANNELS)[:, None] + channel[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        value += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    if total is not None:
        tl.store(total + at, value.to(total.dtype.element_ty), mask=mask)
    if gain is not None:
        norm = tl.sqrt(tl.sum(value * value, 1))
        factor = tl.sqrt(CHANNELS * 1.0) / tl.maximum(norm, 1e-12)
        value = value * factor[:, None]
        value *= tl.load(gain + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        if IS_ACTIVATED:
            value = value / (1.0 + tl.exp(-value))
        batch = position // batch_positions
        target = (batch * out_positions + position % batch_positions) * CHANNELS
        tl.store(
            out + target[:, None] + channel[None, :], value.to(out.dtype.element_ty), mask=mask
        )


def _slices(name: str, x: Tensor) -> int:
    """How many slices lie between the starts of two batches.

    Raises:
        ValueError: slices are not dense, or batches not whole slices apart.
    """
    _, depth, height, width, channels = x.shape
    size = height * width * channels
    is_dense = x.stride()[1:] == (size, width * channels, channels, 1)
    if not is_dense or (len(x) > 1 and x.stride(0) % size):
        raise ValueError(
            f"{name} must have dense slices [H, W, C], got {tuple(x.shape)} with strides "
            f"{x.stride()}"
        )
    return x.stride(0) // size if len(x) > 1 else depth


def _reach(x: Tensor) -> int:
    """The offset behind the last number, and as much again for a window beyond the border."""
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + (
        (x.shape[3] + 1) * x.shape[4] * 2 + 1
    )


def _check_vector(name: str, vector: Tensor | None, x: Tensor, size: int) -> None:
    if vector is None:
        return
    if vector.shape != (size,) or not vector.is_contiguous() or vector.device != x.device:
        raise ValueError(
            f"{name} must be dense [{size}] on {x.device}, got {tuple(vector.shape)} with strides "
            f"{vector.stride()} on {vector.device}"
        )


def _check_same_shape(name: str, other: Tensor | None, shape: tuple[int, ...]) -> None:
    if other is not None and tuple(other.shape) != tuple(shape):
        raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(other.shape)}")


def _check_convolution(x: Tensor, weights: PackedWeights, others: dict[str, Tensor | None]) -> None:
    tensors = {"x": x, "weights": weights.matrix}
    check_tensors(tensors | {name: other for name, other in others.items() if other is not None})
    batch, depth, height, width, channels = x.shape
    windows = batch * depth * height * width // weights.step**2
    # Counts of windows and distances inside a window are 32-bit numbers.
    if max(windows + _BLOCK_M, (weights.depth_taps + 1) * height * width * channels) > _MOST:
        raise ValueError(f"x is too large for one launch: {tuple(x.shape)}; pass fewer slices")


def convolve_channels_triton(
    x: Tensor,
    weights: PackedWeights,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    is_rectified: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """`reference_channels.convolve_channels` in one launch.

    Raises:
        ValueError: shapes, types or strides that the kernel cannot do, with what it can.
    """
    shape = weights.out_shape(x)
    _check_convolution(x, weights, {"residual": residual, "out": out})
    _check_vector("bias", bias, x, shape[-1])
    _check_same_shape("residual", residual, shape)
    _check_same_shape("out", out, shape)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
    if out.numel():
        plan_convolution(x, weights, bias, residual, out, is_rectified=is_rectified).run()
    return out


def convolve_to_planes_triton(
    x: Tensor, weights: PackedWeights, *, bias: Tensor, scale: float, shift: float
) -> Tensor:
    """`reference_channels.convolve_to_planes` in one launch.

    Raises:
        ValueError: shapes, types or strides that the kernel cannot do, with what it can.
    """
    batch, slices, height, width, planes = weights.out_shape(x)
    _check_convolution(x, weights, {})
    _check_vector("bias", bias, x, planes)
    out = torch.empty(batch, slices, planes, height, width, dtype=torch.float32, device=x.device)
    if out.numel():
        plan_convolution(
            x, weights, bias, None, out, to_planes=True, scale=scale, shift=shift
        ).run()
    return out


def convolution_options(weights: PackedWeights, capability: int) -> dict[str, int]:
    """Warps, stages and registers for a GPU."""
    if weights.block_n < 128:
        return {"num_warps": 8 if weights.block_n == 64 else 4, "num_stages": 3}
    options = {"num_warps": 8, "num_stages": 3}
    # On Hopper this lets two programs share a multiprocessor and spills nothing; elsewhere it does.
    return options | {"maxnreg": 128} if capability == 90 else options


def plan_convolution(
    x: Tensor,
    weights: PackedWeights,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    *,
    is_rectified: bool = False,
    to_planes: bool = False,
    scale: float = 1.0,
    shift: float = 0.0,
    block_m: int | None = None,
    options: dict[str, int] | None = None,
) -> Launch:
    """The launch for arguments that have been checked.

    Args:
        to_planes: out is float32 [B, D, C, H, W], and `scale` and `shift` apply.
        block_m, options: windows of a program, warps and stages; for measurements.
    """
    batch, slices, height, width, _ = weights.out_shape(x)
    windows_high, windows_wide = height // weights.cell, width // weights.cell
    depth = slices // weights.grow
    phases, _, results = weights.matrix.shape
    windows = batch * depth * windows_high * windows_wide
    tiles = results // weights.block_n
    # 64-bit offsets take twice the registers, so a wide tile must be half as high.
    is_large = max(map(_reach, (x, out, x if residual is None else residual))) > _MOST
    is_crowded = is_large and weights.block_n >= 128
    block_m = block_m or (_BLOCK_M // 2 if is_crowded else _BLOCK_M)
    arguments = {
        "x": x,
        "weight": weights.matrix,
        "bias": bias,
        "residual": residual,
        "out": out,
        "scale": scale,
        "shift": shift,
        "windows": windows,
        "depth": depth,
        "windows_high": windows_high,
        "windows_wide": windows_wide,
        "height": x.shape[2],
        "width": x.shape[3],
        "x_slices": _slices("x", x),
        "out_slices": slices if to_planes else _slices("out", out),
        "residual_slices": 0 if residual is None else _slices("residual", residual),
        "CHANNELS": weights.channels,
        "OUT_CHANNELS": weights.out_channels,
        "DEPTH_TAPS": weights.depth_taps,
        "ROWS": weights.rows,
        "COLUMNS": weights.columns,
        "STEP": weights.step,
        "CELL": weights.cell,
        "GROW": weights.grow,
        "IS_PHASED": weights.is_phased,
        "IS_RECTIFIED": is_rectified,
        "TO_PLANES": to_planes,
        "RESULTS": weights.results,
        "TILES": tiles,
        "PHASES": phases,
        "IS_LARGE": is_large,
        "BLOCK_M": block_m,
        "BLOCK_N": weights.block_n,
        "BLOCK_K": weights.block_k,
    }
    grid = (triton.cdiv(windows, block_m) * phases * tiles,)
    if options is None:
        options = convolution_options(weights, compute_capability(x.device))
    return Launch(convolve_kernel, grid, arguments, options)


def normalise_channels_triton(
    x: Tensor,
    gain: Tensor | None,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    total: Tensor | None = None,
    out: Tensor | None = None,
    is_activated: bool = True,
) -> Tensor | None:
    """`reference_channels.normalise_channels` in one launch.

    Raises:
        ValueError: shapes, types or strides that the kernel cannot do, with what it can.
    """
    if x.ndim != 5 or not 1 <= x.shape[-1] <= _MOST_CHANNELS:
        raise ValueError(f"x must be [B, D, H, W, 1 to {_MOST_CHANNELS}], got {tuple(x.shape)}")
    dense = {"x": x, "residual": residual, "total": total}
    given = {name: value for name, value in dense.items() if value is not None}
    check_tensors(given | ({} if out is None else {"out": out}))
    for name, value in given.items():
        _check_same_shape(name, value, x.shape)
        if not value.is_contiguous():
            raise ValueError(f"{name} must be dense, got strides {value.stride()}")
    _check_same_shape("out", out, x.shape)
    _check_vector("gain", gain, x, x.shape[-1])
    _check_vector("bias", bias, x, x.shape[-1])
    if gain is not None and out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        plan_normalisation(x, gain, bias, residual, total, out, is_activated=is_activated).run()
    return None if gain is None else out


def plan_normalisation(
    x: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    total: Tensor | None,
    out: Tensor | None,
    *,
    is_activated: bool,
) -> Launch:
    """The launch for arguments that have been checked."""
    channels = x.shape[-1]
    block = triton.next_power_of_2(channels)
    # 2048 numbers on 128 threads: enough loads in flight, few enough registers.
    rows = max(2048 // block, 1)
    positions, area = math.prod(x.shape[:-1]), math.prod(x.shape[2:4])
    arguments = {
        "x": x,
        "gain": gain,
        "bias": bias,
        "residual": residual,
        "total": total,
        "out": None if gain is None else out,
        "positions": positions,
        "batch_positions": x.shape[1] * area,
        "out_positions": 0 if gain is None else _slices("out", out) * area,
        "CHANNELS": channels,
        "IS_ACTIVATED": is_activated,
        "ROWS": rows,
        "BLOCK": block,
    }
    return Launch(normalise_kernel, (triton.cdiv(positions, rows),), arguments, {"num_warps": 4})
