"""Convolution of channels-last features.

A program of the convolution makes a tile of windows by results as a matrix product. It reads the
rows of its windows as they lie in memory, so no unfolded input exists. A window's row is a run of
numbers without gaps (positions, channels inside), which is cut into equal parts whatever the number
of channels; parts beyond the border are masked. Where the window is deep a program makes several
slices in a row, which share what they read: reading, not arithmetic, bounds few channels.

Reference: `reference_channels`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, check_tensors, compute_capability
from .reference_channels import PackedWeights, frames_of_program

_MOST_WINDOWS = 256  # of a program
_MOST = 2**31 - 1
_HAS_PAIRS_KERNEL = triton.__version__.startswith("3.6.")  # see `gluon_pairs`
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
    gain,
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
    STEP_HIGH: tl.constexpr,
    STEP_WIDE: tl.constexpr,
    CELL_HIGH: tl.constexpr,
    CELL_WIDE: tl.constexpr,
    GROW: tl.constexpr,
    IS_PHASED: tl.constexpr,
    IS_RECTIFIED: tl.constexpr,
    TO_PLANES: tl.constexpr,
    RESULTS: tl.constexpr,
    TILES: tl.constexpr,
    PHASES: tl.constexpr,
    IS_LARGE: tl.constexpr,
    IS_SUM_FIRST: tl.constexpr,
    FRAMES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of windows by a tile of results, of one phase, for FRAMES slices in a row."""
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
    if FRAMES == 1:
        index = line % depth
        batch = line // depth
    else:
        groups = (depth + (FRAMES - 1)) // FRAMES
        # The last group makes some slices of the one before again, rather than any beyond the end.
        index = tl.minimum(line % groups * FRAMES, depth - FRAMES)
        batch = line // groups
    batch = batch.to(tl.int64 if IS_LARGE else tl.int32)
    top, left = row * STEP_HIGH - 1, column * STEP_WIDE - 1
    if IS_PHASED:
        top += phase // 2 % 2
        left += phase % 2

    is_result = n < RESULTS
    is_made = is_window[:, None] & is_result[None, :]
    channel = n % OUT_CHANNELS
    out_row, out_column = row * CELL_HIGH, column * CELL_WIDE
    out_width = windows_wide * CELL_WIDE
    size = windows_high * CELL_HIGH * out_width
    inside = tl.zeros_like(n)
    offset = n[None, :]
    slice_out = index
    if IS_PHASED:
        out_row += phase // 2 % 2
        out_column += phase % 2
        slice_out = index * GROW + phase // 4
    else:
        inside = n // (OUT_CHANNELS * CELL_WIDE) * out_width + n // OUT_CHANNELS % CELL_WIDE
        if CELL_HIGH > 1:
            offset = (inside * OUT_CHANNELS + channel)[None, :]
    within = out_row * out_width + out_column

    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if IS_SUM_FIRST:
        # At the end, a wide tile would need registers beside the products.
        first = ((batch * residual_slices + slice_out) * size + within) * OUT_CHANNELS
        more = tl.load(residual + (first[:, None] + offset), mask=is_made, other=0.0)
        accumulator += more.to(tl.float32)
    if bias is not None:
        offsets = tl.load(bias + channel, mask=is_result, other=0.0).to(tl.float32)
        accumulator += offsets[None, :]

    RUN: tl.constexpr = COLUMNS * CHANNELS
    PARTS: tl.constexpr = (RUN + BLOCK_K - 1) // BLOCK_K
    # Several slices see the same slices and weights: all taps in depth are one step then.
    TAPS: tl.constexpr = 1 if FRAMES == 1 else DEPTH_TAPS
    STEPS: tl.constexpr = DEPTH_TAPS // TAPS * ROWS * PARTS
    LINE: tl.constexpr = TILES * BLOCK_N
    accumulators = (accumulator,)
    for _ in tl.static_range(FRAMES - 1):
        accumulators += (accumulator,)
    k = tl.arange(0, BLOCK_K)
    area = height * width * CHANNELS
    start = (((batch * x_slices + index) * height + top) * width + left) * CHANNELS
    weights = weight + phase.to(tl.int64) * (STEPS * TAPS * BLOCK_K * LINE)
    weights += k[:, None] * LINE + n[None, :]
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
        here = x + (start[:, None] + (skipped + at)[None, :])
        matrices = (tl.load(weights),)
        for t in tl.static_range(1, TAPS):
            matrices += (tl.load(weights + t * (ROWS * PARTS * BLOCK_K * LINE)),)
        for s in tl.static_range(FRAMES + TAPS - 1):
            values = tl.load(here + s * area, mask=mask, other=0.0)
            sums = ()
            for f in tl.static_range(FRAMES):
                if s - f >= 0 and s - f < TAPS:
                    sums += (tl.dot(values, matrices[s - f], accumulators[f]),)
                else:
                    sums += (accumulators[f],)
            accumulators = sums
        weights += BLOCK_K * LINE

    for f in tl.static_range(FRAMES):
        result = accumulators[f]
        if TO_PLANES:
            plane = (batch * out_slices + slice_out + f) * OUT_CHANNELS
            target = (plane * size + within)[:, None] + (channel * size + inside)[None, :]
            result = result * scale + shift
            is_bad = (result != result) | (tl.abs(result) == float("inf"))
            limited = tl.minimum(tl.maximum(result, 0.0), 1.0)
            tl.store(out + target, tl.where(is_bad, float("nan"), limited), mask=is_made)
        else:
            if residual is not None and not IS_SUM_FIRST:
                first = ((batch * residual_slices + slice_out + f) * size + within) * OUT_CHANNELS
                more = tl.load(residual + (first[:, None] + offset), mask=is_made, other=0.0)
                result += more.to(tl.float32)
            if gain is not None:
                # As in `normalise_kernel`; a tile holds all channels of CELL_WIDE positions.
                squares = result * result
                factor = tl.zeros_like(result)
                for g in tl.static_range(CELL_WIDE):
                    is_own = (n // OUT_CHANNELS == g)[None, :]
                    norm = tl.sqrt(tl.sum(tl.where(is_own, squares, 0.0), 1))
                    length = tl.sqrt(OUT_CHANNELS * 1.0) / tl.maximum(norm, 1e-12)
                    factor = tl.where(is_own, length[:, None], factor)
                result *= factor
                gains = tl.load(gain + channel, mask=is_result, other=0.0).to(tl.float32)
                result *= gains[None, :]
                result = result / (1.0 + tl.exp(-result))
            if IS_RECTIFIED:
                # Not a maximum, which would turn NaN to zero.
                result = tl.where(result < 0.0, 0.0, result)
            first = ((batch * out_slices + slice_out + f) * size + within) * OUT_CHANNELS
            target = out + (first[:, None] + offset)
            tl.store(target, result.to(out.dtype.element_ty), mask=is_made)


def slices_between(name: str, x: Tensor) -> int:
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


def check_vector(name: str, vector: Tensor | None, x: Tensor, size: int) -> None:
    if vector is None:
        return
    if vector.shape != (size,) or not vector.is_contiguous() or vector.device != x.device:
        raise ValueError(
            f"{name} must be dense [{size}] on {x.device}, got {tuple(vector.shape)} with strides "
            f"{vector.stride()} on {vector.device}"
        )


def check_same_shape(name: str, other: Tensor | None, shape: tuple[int, ...]) -> None:
    if other is not None and tuple(other.shape) != tuple(shape):
        raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(other.shape)}")


def _check_convolution(x: Tensor, weights: PackedWeights, others: dict[str, Tensor | None]) -> None:
    tensors = {"x": x, "weights": weights.matrix}
    check_tensors(tensors | {name: other for name, other in others.items() if other is not None})
    batch, depth, height, width, channels = x.shape
    windows = batch * depth * height * width // math.prod(weights.step)
    # Counts of windows and distances inside a window are 32-bit numbers.
    if max(windows + _MOST_WINDOWS, (weights.depth_taps + 1) * height * width * channels) > _MOST:
        raise ValueError(f"x is too large for one launch: {tuple(x.shape)}; pass fewer slices")


def convolve_channels_triton(
    x: Tensor,
    weights: PackedWeights,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gain: Tensor | None = None,
    is_rectified: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """`reference_channels.convolve_channels` in one launch.

    Raises:
        ValueError: shapes, types or strides that the kernel cannot do, with what it can.
    """
    shape = weights.out_shape(x)
    _check_convolution(x, weights, {"residual": residual, "out": out})
    check_vector("bias", bias, x, shape[-1])
    check_vector("gain", gain, x, shape[-1])
    if gain is not None and (weights.cell[0] > 1 or weights.results > weights.block_n):
        raise ValueError("gain needs windows of a row whose results fit one tile")
    check_same_shape("residual", residual, shape)
    check_same_shape("out", out, shape)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
    elif residual is not None and residual.data_ptr() == out.data_ptr():
        # Programs may make a slice twice.
        raise ValueError("out must not be the residual")
    if out.numel():
        plan_convolution(
            x, weights, bias, residual, out, gain=gain, is_rectified=is_rectified
        ).run()
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
    check_vector("bias", bias, x, planes)
    out = torch.empty(batch, slices, planes, height, width, dtype=torch.float32, device=x.device)
    if out.numel():
        plan_convolution(
            x, weights, bias, None, out, to_planes=True, scale=scale, shift=shift
        ).run()
    return out


class ConvolutionTile(NamedTuple):
    """How the programs of a convolution are cut.

    Attributes:
        block_m: windows of a program.
        frames: slices of the output that a program makes for these windows; they share loads.
        num_warps, num_stages: as Triton's.
        maxnreg: most registers of a thread; None: the compiler's choice.
    """

    block_m: int
    frames: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Options of the launch."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.maxnreg is None else options | {"maxnreg": self.maxnreg}


def convolution_tile(
    weights: PackedWeights,
    depth: int,
    capability: int,
    *,
    is_large: bool = False,
    is_sum: bool = False,
) -> ConvolutionTile:
    """The tile for a GPU.

    Args:
        depth: slices of the output before growth.
        is_large: offsets need 64 bits, and with them twice the registers.
        is_sum: a residual is added.
    """
    if weights.block_n >= 128:
        # On Hopper this lets two programs share a multiprocessor and spills nothing; elsewhere it
        # does.
        return ConvolutionTile(64 if is_large else 128, 1, 8, 3, 128 if capability == 90 else None)
    if weights.is_phased or is_large:
        return ConvolutionTile(128, 1, 8 if weights.block_n == 64 else 4, 3)
    if weights.depth_taps == 1:
        small = capability == 90 and weights.block_n == 64
        return ConvolutionTile(
            64 if small else 128, 1, 4 if small or weights.block_n < 64 else 8, 3
        )
    # Two stages and few enough registers: three programs share a Hopper multiprocessor; and 99 KB
    # suffice elsewhere.
    most = 2 if weights.block_n * weights.block_k == 64 * 64 else 4
    frames = frames_of_program(depth, weights.depth_taps, most)
    is_crowded = frames == 4 and weights.block_n == 64 and not is_sum
    return ConvolutionTile(64, frames, 4, 2, 168 if capability == 90 and is_crowded else None)


def takes_hopper_kernel(weights: PackedWeights) -> bool:
    """Whether causal weights are for `gluon_channels`: a window a position, more channels than 64,
    all results in one tile; or for `gluon_pairs`: in pairs, whose numbers are whole sixteens."""
    if weights.is_phased or weights.depth_taps != 3 or weights.results > weights.block_n:
        return False
    if weights.cell == (1, 2):
        is_whole = 2 * weights.channels % 16 == 0 and weights.run % weights.block_k == 0
        return _HAS_PAIRS_KERNEL and is_whole and weights.block_n == 64
    return weights.cell == (1, 1) and weights.block_n == 128


def plan_convolution(
    x: Tensor,
    weights: PackedWeights,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    *,
    gain: Tensor | None = None,
    is_rectified: bool = False,
    to_planes: bool = False,
    scale: float = 1.0,
    shift: float = 0.0,
    tile: ConvolutionTile | None = None,
    capability: int | None = None,
) -> Launch:
    """The launch for arguments that have been checked.

    Args:
        to_planes: out is float32 [B, D, C, H, W], and `scale` and `shift` apply.
        tile: None: the one for the GPU; others for measurements.
        capability: of a GPU that need not be there; None: that of x's device.
    """
    batch, slices, height, width, _ = weights.out_shape(x)
    windows_high, windows_wide = height // weights.cell[0], width // weights.cell[1]
    depth = slices // weights.grow
    phases, _, results = weights.matrix.shape
    tiles = results // weights.block_n
    is_large = max(map(_reach, (x, out, x if residual is None else residual))) > _MOST
    if tile is None:
        capability = compute_capability(x.device) if capability is None else capability
        is_sum = residual is not None
        is_bare = not (is_sum or is_large or to_planes) and x.element_size() == 2
        if capability == 90 and is_bare and takes_hopper_kernel(weights):
            # Late: others need no Gluon.
            if weights.cell == (1, 2):
                from .gluon_pairs import plan_gluon_pairs as plan
            else:
                from .gluon_channels import plan_gluon_convolution as plan

            return plan(
                x,
                weights,
                bias,
                out,
                gain=gain,
                is_rectified=is_rectified,
                x_slices=slices_between("x", x),
                out_slices=slices_between("out", out),
            )
        tile = convolution_tile(weights, depth, capability, is_large=is_large, is_sum=is_sum)
    windows = batch * triton.cdiv(depth, tile.frames) * windows_high * windows_wide
    arguments = {
        "x": x,
        "weight": weights.matrix,
        "bias": bias,
        "residual": residual,
        "gain": gain,
        "out": out,
        "scale": scale,
        "shift": shift,
        "windows": windows,
        "depth": depth,
        "windows_high": windows_high,
        "windows_wide": windows_wide,
        "height": x.shape[2],
        "width": x.shape[3],
        "x_slices": slices_between("x", x),
        "out_slices": slices if to_planes else slices_between("out", out),
        "residual_slices": 0 if residual is None else slices_between("residual", residual),
        "CHANNELS": weights.channels,
        "OUT_CHANNELS": weights.out_channels,
        "DEPTH_TAPS": weights.depth_taps,
        "ROWS": weights.rows,
        "COLUMNS": weights.columns,
        "STEP_HIGH": weights.step[0],
        "STEP_WIDE": weights.step[1],
        "CELL_HIGH": weights.cell[0],
        "CELL_WIDE": weights.cell[1],
        "GROW": weights.grow,
        "IS_PHASED": weights.is_phased,
        "IS_RECTIFIED": is_rectified,
        "TO_PLANES": to_planes,
        "RESULTS": weights.results,
        "TILES": tiles,
        "PHASES": phases,
        "IS_LARGE": is_large,
        "IS_SUM_FIRST": residual is not None and weights.block_n >= 128,
        "FRAMES": tile.frames,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": weights.block_n,
        "BLOCK_K": weights.block_k,
    }
    grid = (triton.cdiv(windows, tile.block_m) * phases * tiles,)
    return Launch(convolve_kernel, grid, arguments, tile.options)
