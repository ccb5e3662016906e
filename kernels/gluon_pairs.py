"""Causal convolution of few channels for Hopper (9.0) in Gluon: what neighbours share is read once.

The same weights and meaning as pairs in `triton_channels`, whose kernel is the plain twin. Two
positions side by side are a line of 32 to 64 numbers without a gap, and a window of a pair is two
lines: its own and the next. So a program copies each line once where the twin copies it twice, and
multiplies the same lines again, one further on. Pairs begin at odd positions, so that lines begin
at even ones, where memory is read in whole sectors. All products of a step are handed to the
matrix units at once, as in `gluon_channels`. The interpreter cannot run Gluon; and Triton after 3.6
lets no view reach beyond the eight lines that it begins with.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_channels import place
from .launch import Launch
from .reference_channels import PackedWeights, frames_of_program

_load_tile = async_copy.async_copy_global_to_shared

_STAGES = 3
_BLOCK_M = 64  # what a warpgroup multiplies at a time
_MOST_FRAMES = 4  # of a program: 128 registers of a thread for their sums
_LENGTHS = ["windows", "depth", "height", "period", "width"]
_LENGTHS += ["x_slices", "out_slices"]


@gluon.jit
def _window_of(line, first_window):
    """Lines of a tile are dealt out to eight places, so that the next window is eight lines on: a
    matrix unit reads lines by eights."""
    return first_window + line % 8 * 8 + line // 8


@gluon.jit
def _starts(line, first_window, windows, depth, period, height, width, x_slices,
            CHANNELS: gl.constexpr, SPAN: gl.constexpr, FRAMES: gl.constexpr):  # fmt: skip
    """Where the numbers before each window's begin, the row above it, and whether there are any."""
    window = _window_of(line, first_window)
    batch, index, row, column = place(window, depth, height, period, FRAMES)
    top = row - 1
    start = (((batch * x_slices + index) * height + top) * width) * CHANNELS + (column - 1) * SPAN
    # One column in front of every row has nothing; it also ends the row before.
    return start, top, (window < windows) & (column > 0)


@gluon.jit
def _lines(tile, stage, first: gl.constexpr, count: gl.constexpr, BLOCK_M: gl.constexpr):
    """Lines of a stage, which lie by eights one behind the other."""
    eight = tile.index(stage * (BLOCK_M // 8 + 2) + first // 8)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([count, 16], tile.dtype)
    return eight._reinterpret(tile.dtype, [count, 16], layout)


@gluon.jit
def _copy_step(
    x_tiles, weight_tiles, stage, step, x, weight, start, top, has_any, more_start, more_top,
    more_has_any, height, width,
    CHANNELS: gl.constexpr, SPAN: gl.constexpr, SHIFTS: gl.constexpr, DEPTH_TAPS: gl.constexpr,
    ROWS: gl.constexpr, FRAMES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    x_layout: gl.constexpr, weight_layout: gl.constexpr,
):  # fmt: skip
    """Starts the copies of 16 numbers of each position in every slice, and of their weights."""
    PARTS: gl.constexpr = SPAN // 16
    SLICES: gl.constexpr = FRAMES + DEPTH_TAPS - 1
    part = step % PARTS
    tap_row = step // PARTS
    at = (
        tap_row * width * CHANNELS
        + part * 16
        + gl.arange(0, 16, layout=gl.SliceLayout(0, x_layout))
    )
    y, more_y = top + tap_row, more_top + tap_row
    mask = (has_any & (y >= 0) & (y < height))[:, None]
    more_mask = (more_has_any & (more_y >= 0) & (more_y < height))[:, None]
    here = x + (start[:, None] + at[None, :])
    more = x + (more_start[:, None] + at[None, :])
    area = height * width * CHANNELS
    for s in gl.static_range(SLICES):
        tile = _lines(x_tiles[s], stage, 0, BLOCK_M, BLOCK_M)
        _load_tile(tile, here + s * area, mask=mask)
    # Not in turns: two copies into one tile wait for each other.
    for s in gl.static_range(SLICES):
        tile = _lines(x_tiles[s], stage, BLOCK_M, 16, BLOCK_M)
        _load_tile(tile, more + s * area, mask=more_mask)
    k = gl.arange(0, 16, layout=gl.SliceLayout(1, weight_layout))
    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, weight_layout))
    weights = weight + (k[:, None] * BLOCK_N + n[None, :])
    for t in gl.static_range(DEPTH_TAPS):
        for aside in gl.static_range(SHIFTS):
            first = (((t * ROWS + tap_row) * SHIFTS + aside) * PARTS + part) * 16
            _load_tile(weight_tiles[t * SHIFTS + aside].index(stage), weights + first * BLOCK_N)


@gluon.jit(do_not_specialize=_LENGTHS)
def convolve_pairs_kernel(
    x,
    weight,
    bias,
    gain,
    out,
    windows,
    depth,
    height,
    period,
    width,
    x_slices,
    out_slices,
    CHANNELS: gl.constexpr,
    OUT_CHANNELS: gl.constexpr,
    DEPTH_TAPS: gl.constexpr,
    ROWS: gl.constexpr,
    SPAN: gl.constexpr,
    SHIFTS: gl.constexpr,
    CELL_WIDE: gl.constexpr,
    IS_RECTIFIED: gl.constexpr,
    RESULTS: gl.constexpr,
    FRAMES: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A tile of windows, all results, for FRAMES slices in a row."""
    dtype: gl.constexpr = x.dtype.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    SLICES: gl.constexpr = FRAMES + DEPTH_TAPS - 1
    STEPS: gl.constexpr = ROWS * (SPAN // 16)
    x_layout: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [WARPS, 1], [1, 0])
    weight_layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // BLOCK_N, BLOCK_N // 8], [WARPS, 1], [1, 0]
    )
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_N, 16]
    )
    x_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, 16], dtype)
    weight_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([16, BLOCK_N], dtype)
    # Each on its own: the compiler lets copies into one and the same wait for each other.
    x_tiles = ()
    for _ in gl.static_range(SLICES):
        x_tiles += (gl.allocate_shared_memory(dtype, [STAGES * (BLOCK_M // 8 + 2), 8, 16], x_tile),)
    weight_tiles = ()
    for _ in gl.static_range(DEPTH_TAPS * SHIFTS):
        weight_tiles += (gl.allocate_shared_memory(dtype, [STAGES, 16, BLOCK_N], weight_tile),)

    first_window = gl.program_id(0) * BLOCK_M
    line = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, x_layout))
    start, top, has_any = _starts(
        line, first_window, windows, depth, period, height, width, x_slices,
        CHANNELS, SPAN, FRAMES,
    )  # fmt: skip
    line = BLOCK_M + gl.arange(0, 16, layout=gl.SliceLayout(1, x_layout))
    more_start, more_top, more_has_any = _starts(
        line, first_window, windows, depth, period, height, width, x_slices,
        CHANNELS, SPAN, FRAMES,
    )  # fmt: skip

    accumulator = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=sum_layout)
    if bias is not None:
        n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, sum_layout))
        offsets = gl.load(bias + n % OUT_CHANNELS, mask=n < RESULTS, other=0.0).to(gl.float32)
        accumulator += offsets[None, :]
    accumulators = (accumulator,)
    for _ in gl.static_range(FRAMES - 1):
        accumulators += (accumulator,)

    for step in gl.static_range(STAGES - 1):
        _copy_step(
            x_tiles, weight_tiles, step, step, x, weight, start, top, has_any, more_start,
            more_top, more_has_any, height, width, CHANNELS, SPAN, SHIFTS, DEPTH_TAPS, ROWS,
            FRAMES, BLOCK_M, BLOCK_N, x_layout, weight_layout,
        )  # fmt: skip
        async_copy.commit_group()
    for step in range(STEPS):
        stage = step % STAGES
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        sums = accumulators
        for s in gl.static_range(SLICES):
            for aside in gl.static_range(SHIFTS):
                values = _lines(x_tiles[s], stage, 8 * aside, BLOCK_M, BLOCK_M)
                more = ()
                for f in gl.static_range(FRAMES):
                    if s - f >= 0 and s - f < DEPTH_TAPS:
                        weights = weight_tiles[(s - f) * SHIFTS + aside].index(stage)
                        more += (warpgroup_mma(values, weights, sums[f], is_async=True),)
                    else:
                        more += (sums[f],)
                sums = more
        coming = step + STAGES - 1
        if coming < STEPS:
            _copy_step(
                x_tiles, weight_tiles, coming % STAGES, coming, x, weight, start, top, has_any,
                more_start, more_top, more_has_any, height, width, CHANNELS, SPAN, SHIFTS,
                DEPTH_TAPS, ROWS, FRAMES, BLOCK_M, BLOCK_N, x_layout, weight_layout,
            )  # fmt: skip
        async_copy.commit_group()
        if FRAMES == 1:
            accumulators = (warpgroup_mma_wait(0, deps=sums),)
        else:
            accumulators = warpgroup_mma_wait(0, deps=sums)

    made_layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // BLOCK_N, BLOCK_N // 8], [WARPS, 1], [1, 0]
    )
    line = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, made_layout))
    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, made_layout))
    window = _window_of(line, first_window)
    batch, index, row, column = place(window, depth, height, period, FRAMES)
    # Pairs begin at odd positions: what they read begins at even ones, which lie aligned.
    column = column * CELL_WIDE - (CELL_WIDE - 1)
    position = column[:, None] + (n // OUT_CHANNELS)[None, :]
    is_made = (window < windows)[:, None] & (n < RESULTS)[None, :]
    is_made = is_made & (position >= 0) & (position < width)
    size = height * width
    within = row * width + column
    for f in gl.static_range(FRAMES):
        result = accumulators[f]
        slice_out = batch * out_slices + index + f
        if gain is not None:
            # As in `normalise_kernel`; a tile holds all channels of CELL_WIDE positions.
            squares = result * result
            factor = gl.zeros_like(result)
            of_sum = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, sum_layout))
            for g in gl.static_range(CELL_WIDE):
                is_own = (of_sum // OUT_CHANNELS == g)[None, :]
                norm = gl.sqrt(gl.sum(gl.where(is_own, squares, 0.0), 1))
                length = gl.sqrt(norm * 0.0 + OUT_CHANNELS) / gl.maximum(norm, 1e-12)
                factor = gl.where(is_own, length[:, None], factor)
            result *= factor
            gains = gl.load(gain + of_sum % OUT_CHANNELS, mask=of_sum < RESULTS, other=0.0)
            result *= gains.to(gl.float32)[None, :]
            result = result / (1.0 + gl.exp(-result))
        if IS_RECTIFIED:
            # Not a maximum, which would turn NaN to zero.
            result = gl.where(result < 0.0, 0.0, result)
        target = ((slice_out * size + within) * OUT_CHANNELS)[:, None] + n[None, :]
        made = gl.convert_layout(result.to(dtype), made_layout)
        gl.store(out + target, made, mask=is_made)


def plan_gluon_pairs(
    x: Tensor,
    weights: PackedWeights,
    bias: Tensor | None,
    out: Tensor,
    *,
    gain: Tensor | None,
    is_rectified: bool,
    x_slices: int,
    out_slices: int,
) -> Launch:
    """The launch for arguments that have been checked, of 32-bit offsets.

    Args:
        x_slices, out_slices: between the starts of two batches.
    """
    batch, slices, height, width, _ = weights.out_shape(x)
    frames = frames_of_program(slices, weights.depth_taps, _MOST_FRAMES)
    span = weights.channels * weights.cell[1]
    period = width // weights.cell[1] + 1
    windows = batch * triton.cdiv(slices, frames) * height * period
    arguments = {
        "x": x,
        "weight": weights.matrix,
        "bias": bias,
        "gain": gain,
        "out": out,
        "windows": windows,
        "depth": slices,
        "height": height,
        "period": period,
        "width": width,
        "x_slices": x_slices,
        "out_slices": out_slices,
        "CHANNELS": weights.channels,
        "OUT_CHANNELS": weights.out_channels,
        "DEPTH_TAPS": weights.depth_taps,
        "ROWS": weights.rows,
        "SPAN": span,
        "SHIFTS": weights.run // span,
        "CELL_WIDE": weights.cell[1],
        "IS_RECTIFIED": is_rectified,
        "RESULTS": weights.results,
        "FRAMES": frames,
        "BLOCK_M": _BLOCK_M,
        "BLOCK_N": weights.block_n,
        "STAGES": _STAGES,
    }
    options = {"num_warps": 4}
    if frames == _MOST_FRAMES:
        options["maxnreg"] = 168
    return Launch(convolve_pairs_kernel, (triton.cdiv(windows, _BLOCK_M),), arguments, options)
