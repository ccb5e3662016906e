"""Causal convolution of 65 to 128 channels for Hopper (9.0) in Gluon: many products at once.

The same weights and meaning as in `triton_channels`, whose kernel is the plain twin of this one.
That one waits for each product before the next, because several add to one accumulator; here the
products of a step are handed to the matrix units together, the copies of the next step are started
meanwhile, and there is one wait for all. The interpreter cannot run Gluon.
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

from .launch import Launch
from .reference_channels import PackedWeights, frames_of_program

# Triton 3.9 renamed the copy of 3.6; arguments and meaning are the same.
_load_tile = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

_STAGES = 2
_BLOCK_M = 64  # what a warpgroup multiplies at a time
_MOST_FRAMES = 2  # of a program: more would not leave registers for a second program
_LENGTHS = ["windows", "depth", "height", "width", "x_slices", "out_slices"]


@gluon.jit
def place(window, depth, height, period, FRAMES: gl.constexpr):
    """Batch, first slice, row and column of windows that are counted along a row, period long."""
    column = window % period
    line = window // period
    row = line % height
    line = line // height
    groups = (depth + (FRAMES - 1)) // FRAMES
    # The last group makes some slices of the one before again, rather than any beyond the end.
    index = gl.minimum(line % groups * FRAMES, depth - FRAMES)
    return line // groups, index, row, column


@gluon.jit
def _copy_step(
    x_tiles, weight_tiles, stage, step, x, weight, start, left, top, is_window, height, width,
    CHANNELS: gl.constexpr, DEPTH_TAPS: gl.constexpr, FRAMES: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, x_layout: gl.constexpr,
    weight_layout: gl.constexpr,
):  # fmt: skip
    """Starts the copies of one part of a window's row in every slice, and of its weights."""
    RUN: gl.constexpr = 3 * CHANNELS
    PARTS: gl.constexpr = (RUN + BLOCK_K - 1) // BLOCK_K
    part = step % PARTS
    tap_row = step // PARTS
    at = part * BLOCK_K + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, x_layout))
    y = top + tap_row
    is_row = is_window & (y >= 0) & (y < height)
    position = left[:, None] + (at // CHANNELS)[None, :]
    mask = is_row[:, None] & (position >= 0) & (position < width)
    if RUN % BLOCK_K:
        mask = mask & (at < RUN)[None, :]
    here = x + (start[:, None] + (tap_row * width * CHANNELS + at)[None, :])
    area = height * width * CHANNELS
    for s in gl.static_range(FRAMES + DEPTH_TAPS - 1):
        _load_tile(x_tiles[s].index(stage), here + s * area, mask=mask)
    k = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(1, weight_layout))
    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, weight_layout))
    weights = weight + (step * BLOCK_K * BLOCK_N + k[:, None] * BLOCK_N + n[None, :])
    for t in gl.static_range(DEPTH_TAPS):
        first = t * (3 * PARTS * BLOCK_K * BLOCK_N)
        _load_tile(weight_tiles[t].index(stage), weights + first)


@gluon.jit(do_not_specialize=_LENGTHS)
def convolve_gluon_kernel(
    x,
    weight,
    bias,
    gain,
    out,
    windows,
    depth,
    height,
    width,
    x_slices,
    out_slices,
    CHANNELS: gl.constexpr,
    RESULTS: gl.constexpr,
    DEPTH_TAPS: gl.constexpr,
    IS_RECTIFIED: gl.constexpr,
    FRAMES: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A tile of windows, all results, for FRAMES slices in a row."""
    dtype: gl.constexpr = x.dtype.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    SLICES: gl.constexpr = FRAMES + DEPTH_TAPS - 1
    STEPS: gl.constexpr = 3 * ((3 * CHANNELS + BLOCK_K - 1) // BLOCK_K)
    x_layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // BLOCK_K, BLOCK_K // 8], [WARPS, 1], [1, 0]
    )
    weight_layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // BLOCK_N, BLOCK_N // 8], [WARPS, 1], [1, 0]
    )
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_N, 16]
    )
    x_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_K], dtype)
    weight_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_K, BLOCK_N], dtype)
    # Each on its own: the compiler lets copies into one and the same wait for each other.
    x_tiles = ()
    for _ in gl.static_range(SLICES):
        x_tiles += (gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], x_tile),)
    weight_tiles = ()
    for _ in gl.static_range(DEPTH_TAPS):
        weight_tiles += (gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_N], weight_tile),)

    first_window = gl.program_id(0) * BLOCK_M
    window = first_window + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, x_layout))
    is_window = window < windows
    batch, index, row, column = place(window, depth, height, width, FRAMES)
    top, left = row - 1, column - 1
    start = (((batch * x_slices + index) * height + top) * width + left) * CHANNELS

    accumulator = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=sum_layout)
    channel = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, sum_layout))
    if bias is not None:
        offsets = gl.load(bias + channel, mask=channel < RESULTS, other=0.0).to(gl.float32)
        accumulator += offsets[None, :]
    accumulators = (accumulator,)
    for _ in gl.static_range(FRAMES - 1):
        accumulators += (accumulator,)

    for step in gl.static_range(STAGES - 1):
        _copy_step(
            x_tiles, weight_tiles, step, step, x, weight, start, left, top, is_window, height,
            width, CHANNELS, DEPTH_TAPS, FRAMES, BLOCK_N, BLOCK_K, x_layout, weight_layout,
        )  # fmt: skip
        async_copy.commit_group()
    for step in range(STEPS):
        stage = step % STAGES
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        sums = accumulators
        for s in gl.static_range(SLICES):
            values = x_tiles[s].index(stage)
            more = ()
            for f in gl.static_range(FRAMES):
                if s - f >= 0 and s - f < DEPTH_TAPS:
                    weights = weight_tiles[s - f].index(stage)
                    more += (warpgroup_mma(values, weights, sums[f], is_async=True),)
                else:
                    more += (sums[f],)
            sums = more
        # All have waited for the products of the step before, whose tiles these are.
        coming = step + STAGES - 1
        if coming < STEPS:
            _copy_step(
                x_tiles, weight_tiles, coming % STAGES, coming, x, weight, start, left, top,
                is_window, height, width, CHANNELS, DEPTH_TAPS, FRAMES, BLOCK_N, BLOCK_K,
                x_layout, weight_layout,
            )  # fmt: skip
        async_copy.commit_group()
        if FRAMES == 1:
            accumulators = (warpgroup_mma_wait(0, deps=sums),)
        else:
            accumulators = warpgroup_mma_wait(0, deps=sums)

    made_layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // BLOCK_N, BLOCK_N // 8], [WARPS, 1], [1, 0]
    )
    window = first_window + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, made_layout))
    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, made_layout))
    is_made = (window < windows)[:, None] & (n < RESULTS)[None, :]
    batch, index, row, column = place(window, depth, height, width, FRAMES)
    for f in gl.static_range(FRAMES):
        result = accumulators[f]
        if gain is not None:
            # As in `normalise_kernel`; columns beyond the results are zero.
            norm = gl.sqrt(gl.sum(result * result, 1))
            length = gl.sqrt(norm * 0.0 + RESULTS) / gl.maximum(norm, 1e-12)
            result *= length[:, None]
            gains = gl.load(gain + channel, mask=channel < RESULTS, other=0.0).to(gl.float32)
            result *= gains[None, :]
            result = result / (1.0 + gl.exp(-result))
        if IS_RECTIFIED:
            # Not a maximum, which would turn NaN to zero.
            result = gl.where(result < 0.0, 0.0, result)
        position = ((batch * out_slices + index + f) * height + row) * width + column
        target = (position * RESULTS)[:, None] + n[None, :]
        gl.store(out + target, gl.convert_layout(result.to(dtype), made_layout), mask=is_made)


def plan_gluon_convolution(
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
    windows = batch * triton.cdiv(slices, frames) * height * width
    arguments = {
        "x": x,
        "weight": weights.matrix,
        "bias": bias,
        "gain": gain,
        "out": out,
        "windows": windows,
        "depth": slices,
        "height": height,
        "width": width,
        "x_slices": x_slices,
        "out_slices": out_slices,
        "CHANNELS": weights.channels,
        "RESULTS": weights.results,
        "DEPTH_TAPS": weights.depth_taps,
        "IS_RECTIFIED": is_rectified,
        "FRAMES": frames,
        "BLOCK_M": _BLOCK_M,
        "BLOCK_N": weights.block_n,
        "BLOCK_K": weights.block_k,
        "STAGES": _STAGES,
    }
    grid = (triton.cdiv(windows, _BLOCK_M),)
    return Launch(convolve_gluon_kernel, grid, arguments, {"num_warps": 4})
